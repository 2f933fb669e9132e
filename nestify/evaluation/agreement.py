"""Agreement of levels with a reference network, on images without labels."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isnan
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from nestify.accelerator import as_float64
from nestify.evaluation.accuracy import Timer
from nestify.model.feature_maps import as_list, each_tensor
from nestify.recipe.metric import AGREEMENT, COSINE, Judged, Metric


@dataclass(frozen=True)
class Agreement(Judged):
    """Agreement of one level with a reference network.

    Attributes:
        level: number of the level, from 1; 0 for the dense model.
        agreement: share in percent of the images for which both predict the same class.
        cosine: mean cosine similarity of the logits of both, -1 to 1.
        images: number of images.
        images_per_second: throughput of the forward passes, as in `Accuracy`.
    """

    metric: ClassVar[Metric] = AGREEMENT

    level: int
    agreement: float
    cosine: float
    images: int
    images_per_second: float


@dataclass(frozen=True)
class Similarity(Judged):
    """Similarity of what one level of a backbone returns to what a reference network returns.

    Attributes:
        level: number of the level, from 1; 0 for the dense model.
        cosine: mean cosine similarity of embeddings or, averaged over them, of feature maps, -1 to 1.
        images: number of images.
        images_per_second: throughput of the forward passes, as in `Accuracy`.
    """

    metric: ClassVar[Metric] = COSINE

    level: int
    cosine: float
    images: int
    images_per_second: float


def compared_with_itself(metric: Metric, images: int) -> Agreement | Similarity:
    """Return the result of a network that is compared with itself, as level 0, on a number of images."""
    return Similarity(0, 1.0, images, 0.0) if metric is COSINE else Agreement(0, 100.0, 1.0, images, 0.0)


class Replay:
    """The outputs of a network, computed in the first pass over some batches and repeated in later ones.

    Args:
        network: the network, from images (B, C, H, W) to logits, embeddings or feature maps.

    Every pass must have the same batches, and call `watch_batches` on them.
    """

    def __init__(self, network: Callable[[Tensor], Any]) -> None:
        self._network = network
        self._outputs: list[Any] = []
        self._next = 0

    def watch_batches(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one pass."""
        self._next = 0
        yield from batches

    def __call__(self, images: Tensor) -> Any:
        """Return the outputs for the next batch, on the device of its images."""
        if self._next == len(self._outputs):
            self._outputs.append(each_tensor(self._network(images), Tensor.cpu))
        self._next += 1
        return each_tensor(self._outputs[self._next - 1], lambda tensor: tensor.to(images.device))


@torch.no_grad()
def evaluate_agreement(
    models: Mapping[int, Callable[[Tensor], Any]],
    reference: Callable[[Tensor], Any],
    batches: Iterable[tuple[Tensor, object]],
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    *,
    of_classes: bool = True,
) -> list[Agreement] | list[Similarity]:
    """Compare networks, by level number, with a reference network.

    Args:
        models: networks from images (B, C, H, W) to logits (B, classes), or what the reference returns.
        reference: the network that they are compared with; it is called once for each batch.
        batches: pairs of images and targets; the targets are not used.
        autocast: returns the context of a forward pass, for reduced precision.
        total: returns the sum of a tensor over the processes that each evaluate a share of the images.
        of_classes: whether the networks return logits; else embeddings or feature maps, of which only the
            cosine similarity is measured.
    """
    # images, agreeing predictions, cosine similarities
    sums = {level: torch.zeros(3, dtype=torch.float64) for level in models}
    timers: dict[int, Timer] = {}
    for images, _ in batches:
        with autocast():
            expected = as_list(reference(images))
        for level, model in models.items():
            timer = timers.setdefault(level, Timer(images.device))
            with timer.timing(len(images)), autocast():
                outputs = as_list(model(images))
            sums[level] += _compare(outputs, expected)
    made = _agreement if of_classes else _similarity
    found = [made(level, total(row), timers.get(level)) for level, row in sums.items()]
    return [result for result in found if result.images]  # type: ignore[return-value]  # all of one class


def _compare(outputs: list[Tensor], expected: list[Tensor]) -> Tensor:
    """Return the number of images, of agreeing predictions, and the sum of cosine similarities, (3,)."""
    same = (
        (outputs[0].argmax(-1) == expected[0].argmax(-1)).sum() if outputs[0].ndim == 2 else torch.tensor(0)
    )
    cosine = cosine_similarity(outputs, expected).sum()
    return torch.stack([torch.tensor(float(len(outputs[0]))).double(), same.cpu().double(), cosine.cpu()])


def cosine_similarity(outputs: list[Tensor], expected: list[Tensor]) -> Tensor:
    """Return the cosine similarity of the outputs for each image, averaged over several outputs; (B,)."""
    pairs = zip(outputs, expected, strict=True)
    found = [
        functional.cosine_similarity(as_float64(one).flatten(1), as_float64(other).flatten(1), dim=1)
        for one, other in pairs
    ]
    return torch.stack(found).mean(0)


def _agreement(level: int, sums: Tensor, timer: Timer | None) -> Agreement:
    images, same, cosine = sums.tolist()
    return Agreement(
        level=level,
        agreement=100 * same / images if images else 0.0,
        cosine=_bounded(cosine / images) if images else 0.0,
        images=int(images),
        images_per_second=timer.images_per_second if timer is not None else 0.0,
    )


def _similarity(level: int, sums: Tensor, timer: Timer | None) -> Similarity:
    compared = _agreement(level, sums, timer)
    return Similarity(level, compared.cosine, compared.images, compared.images_per_second)


def _bounded(cosine: float) -> float:
    """Return a cosine without the rounding error that leads out of [-1, 1]; NaN remains."""
    return cosine if isnan(cosine) else min(1.0, max(-1.0, cosine))
