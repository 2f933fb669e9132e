"""The sensitivity of a network's outputs to each of its weights, as the diagonal of the Fisher information.

Setting a weight w to zero changes the distribution that the outputs describe by a divergence of about
w^2 F / 2, where F is the weight's Fisher information. So w^2 F compares weights of all layers with one
another, which their magnitudes alone do not. (The saliency of LeCun, Denker and Solla, "Optimal Brain
Damage", 1989, equation 5, with the Fisher information in place of the second derivative of the loss: no
labels are needed, and it is never negative.)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, islice
from typing import Literal

import torch
from torch import Tensor, nn

from nestify.accelerator import as_float64
from nestify.errors import DivergedError, RecipeError
from nestify.model.feature_maps import Outputs, as_list
from nestify.model.spec import state_tensors

IMAGES = 256
"""Training images on which the Fisher information is measured, unless they have more than `MOST_PIXELS`."""

MOST_PIXELS = 2**22
"""Pixels of these images, which limits the time that large networks take."""

IMAGES_AT_ONCE = 4
"""Images of one backward pass.

The square of a sum of independent gradients of mean zero is, on average, the sum of their squares. So several
images can share a pass; with more of them there are fewer squares to average, and the result is less exact.
"""

Meaning = Literal["class", "labels", "features"]
"""What the outputs are: logits of one class, or of independent labels, or an embedding or feature maps."""


def measure_sensitivity(
    network: nn.Module,
    names: Sequence[str],
    batches: Iterable[Tensor],
    meaning: Meaning,
    images: int | None = None,
) -> dict[str, Tensor]:
    """Return the Fisher information of each of the given weights, averaged over images and smoothed.

    The outputs' distribution is that of the classes or labels, or a normal one around embeddings and feature
    maps whose standard deviation is their root mean square. The same images give the same result.

    Args:
        network: a timm model, which is not changed.
        names: state-dict names of the weights.
        batches: images (B, C, H, W), as the network reads them.
        meaning: what the outputs are.
        images: number of images to use, fewer if there are fewer; None: `IMAGES`, within `MOST_PIXELS`.

    Returns:
        State-dict name -> float32 in the weight's shape, on its device.

    Raises:
        RecipeError: if there are no images.
    """
    tensors = state_tensors(network)
    weights = [tensors[name] for name in names]
    learns = [weight.requires_grad for weight in weights]
    training = {module: module.training for module in network.modules()}
    squares = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    draws = torch.Generator().manual_seed(0)
    count = 0
    try:
        network.train().eval()  # train() drops what models such as LeViT compute from weights in eval mode
        for module in network.modules():
            if isinstance(module, nn.RNNBase) and not module.dropout:
                module.train()  # without which cuDNN has no backward pass; it computes the same
        for weight in weights:
            weight.requires_grad_()
        for batch in _parts(batches, images):
            with torch.enable_grad():
                projection = _projection(network(batch.to(weights[0].device)), meaning, draws)
                gradients = torch.autograd.grad(projection, weights, allow_unused=True)
            for square, gradient in zip(squares, gradients, strict=True):
                if gradient is not None:
                    square.addcmul_(gradient.float(), gradient.float())
            count += len(batch)
    finally:
        network.train()
        for module, mode in training.items():
            module.training = mode
        for weight, learnt in zip(weights, learns, strict=True):
            weight.requires_grad_(learnt)
    if not count:
        raise RecipeError(
            'schedule.score = "fisher" is measured on images, and there are none; give images=, or the '
            'score "lamp"'
        )
    return {name: _smoothed(square / count) for name, square in zip(names, squares, strict=True)}


def total_sensitivity(measured: Iterable[Tensor]) -> float:
    """Return the sum of measured sensitivities."""
    return sum(float(as_float64(each).sum()) for each in measured)


def checked_sensitivity(measured: Mapping[str, Tensor], warn: Callable[[str], None]) -> dict[str, Tensor]:
    """Return measured sensitivities by which all weights can be ranked.

    A weight tensor without any effect, such as one in front of a norm whose weights are still zero, gets the
    mean of the others, so that its weights are ranked by their size and no level lacks it.

    Args:
        measured: as `measure_sensitivity` returns it.
        warn: called with a sentence if there are such tensors.

    Raises:
        DivergedError: if a sensitivity is not finite.
    """
    for name, each in measured.items():
        if not bool(each.isfinite().all()):
            raise DivergedError(
                f"the effect of {name} on the model's outputs is not a number: weights or images have values "
                "that are not finite, or too large; check the checkpoint and the images"
            )
    without = [name for name, each in measured.items() if not bool(each.any())]
    if not without:
        return dict(measured)
    effective = [each for name, each in measured.items() if name not in without]
    count = sum(each.numel() for each in effective)
    mean = total_sensitivity(effective) / count if count else 1.0
    more = f" and {len(without) - 1} more" if len(without) > 1 else ""
    warn(
        f"{without[0]}{more} of {len(measured)} weight tensors do not change the outputs, because a norm or "
        "classifier behind them is zero, or the outputs are saturated; their weights are ranked by size alone"
    )
    return {name: torch.full_like(e, mean) if name in without else e for name, e in measured.items()}


@torch.no_grad()
def weigh(weights: Mapping[str, Tensor], sensitivity: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each weight times the square root of its sensitivity, so that its square is w^2 F.

    Args:
        weights: by name.
        sensitivity: values for at least these weights, as `measure_sensitivity` returns them.
    """
    return {
        name: weight.float() * sensitivity[name].to(weight.device).sqrt() for name, weight in weights.items()
    }


def _parts(batches: Iterable[Tensor], most: int | None) -> Iterator[Tensor]:
    """Yield the images by `IMAGES_AT_ONCE`, whatever the size of the batches; see `measure_sensitivity`."""
    images = (image for batch in batches for image in batch)
    first = next(images, None)
    if first is None:
        return
    if most is None:
        most = min(IMAGES, max(IMAGES_AT_ONCE, MOST_PIXELS // first[0].numel()))
    used = islice(chain([first], images), most)
    for _, same in groupby(used, key=lambda image: image.shape):
        while part := list(islice(same, IMAGES_AT_ONCE)):
            yield torch.stack(part)


def _projection(outputs: Outputs, meaning: Meaning, draws: torch.Generator) -> Tensor:
    """Return the sum of the outputs times random numbers with the covariance of their Fisher information.

    Its gradient g has E[g g^T] = J^T C J, the Fisher information of the weights: J is the derivative of the
    outputs, and C is diag(p) - p p^T for classes with probabilities p, diag(p (1 - p)) for labels, and
    1 / mean square for each number of a feature map. (With drawn classes in place of normal numbers most
    images would have tiny gradients, and a few have very large ones.)
    """
    terms = []
    for output in as_list(outputs):
        values = output.detach().float()
        noise = torch.randn(values.shape, generator=draws, dtype=torch.float32).to(values.device)
        if meaning == "features":
            factors = noise / values.square().mean().sqrt().clamp(min=1e-12)
        elif meaning == "labels":
            factors = noise * (values.sigmoid() * values.neg().sigmoid()).sqrt()
        else:
            shares = values.softmax(-1)
            factors = shares.sqrt() * noise
            factors = factors - shares * factors.sum(-1, keepdim=True)
        terms.append((output.float() * factors).sum())
    return torch.stack(terms).sum()


def _smoothed(information: Tensor) -> Tensor:
    """Return the mean of a weight's Fisher information and its approximation of rank 1.

    That of one weight is measured on few numbers, and is uncertain. Much of it comes from its output channel
    and from its input, whose means are more certain: their product, over the mean of all, is the
    approximation (as in layerwise Kronecker factors: Martens and Grosse, "Optimizing Neural Networks with
    Kronecker-factored Approximate Curvature", 2015, section 3).
    """
    grid = information.flatten(1)
    mean = grid.mean().clamp(min=torch.finfo(torch.float32).tiny)
    product = grid.mean(1, keepdim=True) * (grid.mean(0, keepdim=True) / mean)
    return ((grid + product) / 2).view_as(information)
