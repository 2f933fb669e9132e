"""Batch norm per level: each level has its own statistics and, by default, its own scale and shift.

Levels that share batch norm spoil each other's statistics, because a layer's inputs are distributed
differently at each sparsity. The private tensors are small, and nested training does not work without them.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing fvcore scripts a loss, which torch warns about
    from fvcore.nn.precise_bn import update_bn_stats

from nestify.errors import DataError
from nestify.recipe.options import BatchNormMode

if TYPE_CHECKING:
    from nestify.model.nested_model import NestedModel


def is_statistic_norm(module: nn.Module) -> bool:
    """Whether a module normalises with running statistics, so that each level needs its own copy of them."""
    return isinstance(getattr(module, "running_var", None), Tensor)


def own_names(model: nn.Module, mode: BatchNormMode) -> list[str]:
    """Return the state-dict names of the tensors that each level owns, in module order.

    Args:
        model: the timm model.
        mode: `private`: scale, shift and running statistics; `recalibrate`: the statistics only.
    """
    names: list[str] = []
    for prefix, module in model.named_modules():
        if not is_statistic_norm(module):
            continue
        tensors: Iterable[tuple[str, Tensor]] = module.named_buffers(recurse=False)
        if mode == "private":
            tensors = [*module.named_parameters(recurse=False), *tensors]
        names += [f"{prefix}.{local}" for local, _ in tensors if local not in _non_persistent(module)]
    return names


def _non_persistent(module: nn.Module) -> set[str]:
    return set(module._non_persistent_buffers_set)


@torch.no_grad()
def norms_over_images(model: nn.Module, image: Tensor) -> list[str]:
    """Return the names of the batch norms that see one value per channel and image.

    In training mode they need two images or more, because a single value has no variance. Such layers follow
    a global pooling, or a stage that reduces the image to one pixel.

    Args:
        model: the model; left in eval mode.
        image: one image, (1, C, H, W), on the model's device.
    """
    found: list[str] = []

    def look(name: str, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if x.numel() == x.shape[1] and name not in found:
            found.append(name)

    model.eval()
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs))
        for name, module in norms.items()
    ]
    try:
        if norms:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor], n_batches: int) -> int:
    """Recompute the running statistics of a plain model from images, in place.

    They become the population statistics over all batches, each weighted by its number of values (Wu and
    Johnson, "Rethinking Batch in BatchNorm", 2021, section 3 and appendix), computed by fvcore. Dropout and
    stochastic depth stay off.

    Args:
        model: a plain model, such as `NestedModel.at_level` returns; left in eval mode.
        batches: image batches of shape (B, C, H, W) on the model's device. A batch of a single image is
            joined to a neighbour.
        n_batches: maximum number of batches to use.

    Returns:
        Number of batch-norm layers that were recalibrated.

    Raises:
        DataError: if there is a single image, and a batch norm sees one value of it per channel.
    """
    batches = join_single_images(batches)
    try:
        if isinstance(model, fx.GraphModule):
            return _recalibrate_graph(model, batches, n_batches)
        with _batch_norm_training(model) as layers:
            if layers:
                # fvcore asks for an exact number of batches, which is not known while images may be skipped.
                update_bn_stats(_IgnoreNone(model), chain(batches, repeat(None)), num_iters=n_batches)
        return len(layers)
    except ValueError as error:  # torch: "Expected more than 1 value per channel when training"
        raise DataError(f"batch norm needs two readable training images or more ({error})") from error


def recalibrate_level(nested: "NestedModel", level: int, batches: Iterable[Tensor], n_batches: int) -> None:
    """Recompute the running statistics of a level of a nested model, which are its own; see `recalibrate`."""
    plain = nested.at_level(level)
    recalibrate(plain, batches, n_batches)
    nested.load_own(level, plain.state_dict())


Statistics = Mapping[str, Tensor]
"""Running means and variances, by state-dict name."""


def running_statistics(model: nn.Module) -> Statistics:
    """Return the running means and variances of a model, not copied."""
    ends = (".running_mean", ".running_var")
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(ends)}


@torch.no_grad()
def relate_statistics(model: nn.Module, measured: Statistics, original: Statistics) -> None:
    """Correct a level's measured statistics by what the same measurement does to the original network.

    The statistics of a pretrained network come from more images than a measurement has, and from
    augmented ones. Per channel, with m, v measured and m', v' original statistics of the original network,
    and m_k, v_k measured of the level:

        mean = m_k + sqrt(v_k) * (m' - m) / sqrt(v)        variance = v_k * v' / v

    So the level moves by as many standard deviations as the original network does, and the original
    network, measured in this way, keeps its statistics exactly.

    Args:
        model: a recalibrated level, changed in place.
        measured: statistics of the original network, measured on the images of the level; the part that
            the level has.
        original: statistics that the original network came with; the same part.
    """
    tensors = running_statistics(model)
    for name, variance in tensors.items():
        norm, _, kind = name.rpartition(".")
        if kind != "running_var" or name not in original:
            continue
        mean_name = f"{norm}.running_mean"
        deviations = (original[mean_name] - measured[mean_name]) / (measured[name] + TINY_VARIANCE).sqrt()
        tensors[mean_name].add_(deviations * (variance + TINY_VARIANCE).sqrt())
        ratio = (original[name] + TINY_VARIANCE) / (measured[name] + TINY_VARIANCE)
        variance.add_(TINY_VARIANCE).mul_(ratio).sub_(TINY_VARIANCE).clamp_min_(0)


TINY_VARIANCE = 1e-5
"""Added to variances before they are divided, for channels that are constant."""


def join_single_images(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield batches (B, C, H, W), with each batch of a single image joined to the next or to the last one.

    A batch of one image is left only if it is the only batch.
    """
    ready: Tensor | None = None
    current: Tensor | None = None
    for batch in batches:
        if current is not None and len(current) == 1:
            current = torch.cat([current, batch])
            continue
        if ready is not None:
            yield ready
        ready, current = current, batch
    if ready is not None and current is not None and len(current) == 1:
        ready, current = torch.cat([ready, current]), None
    if ready is not None:
        yield ready
    if current is not None:
        yield current


class _IgnoreNone(nn.Module):
    """A model that does nothing where it gets None instead of images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor | None) -> None:
        if images is not None:
            self.model(images)


class GraphStatistics(fx.Interpreter):
    """An interpreter of a network made by torch.export that sums up the batch statistics of its norms.

    Every batch norm normalises by the batch. A batch's weight is its number of images over that of the first
    batch.

    Attributes:
        weight: sum of the weights of all runs.
        sums: node of a batch norm -> weighted sums over all runs of its input's mean and mean square per
            channel, both of shape (channels,).
    """

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.weight = 0.0
        self.sums: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self._images = 0
        self._share = 1.0

    def add(self, images: Tensor, known: Mapping[fx.Node, Any] | None = None) -> None:
        """Run the network on a batch (B, C, H, W), and add its statistics.

        Args:
            images: the batch.
            known: outputs of nodes that need not run; None for those whose output nothing else reads.
        """
        self._images = self._images or len(images)
        self._share = len(images) / self._images
        self.weight += self._share
        self.run(images, initial_env=None if known is None else dict(known))

    def run_node(self, n: fx.Node) -> Any:
        if n.target is not torch.ops.aten.batch_norm.default:
            return super().run_node(n)
        x, weight, bias, *_, eps, _ = self.fetch_args_kwargs_from_env(n)[0]
        dims = [dim for dim in range(x.ndim) if dim != 1]
        mean, square = self.sums.get(n, (0.0, 0.0))
        self.sums[n] = mean + self._share * x.mean(dims), square + self._share * x.square().mean(dims)
        return functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)

    def store(self) -> list[str]:
        """Set the running statistics of the norms that have run, and return their names in the network."""
        assert isinstance(self.module, fx.GraphModule)
        names = []
        for node, (means, squares) in self.sums.items():
            own = [str(argument.target) for argument in node.args[3:5] if isinstance(argument, fx.Node)]
            mean, variance = map(self.module.get_buffer, own)
            mean.copy_(means / self.weight)
            variance.copy_((squares / self.weight - mean.square()).clamp_min(0))
            names += own
        return names


def _recalibrate_graph(model: fx.GraphModule, batches: Iterable[Tensor], n_batches: int) -> int:
    """Do the work of `recalibrate` for a network made by torch.export."""
    statistics = GraphStatistics(model)
    for images in islice(batches, n_batches):
        statistics.add(images)
    statistics.store()
    return len(statistics.sums)


@contextmanager
def _batch_norm_training(model: nn.Module) -> Iterator[Sequence[nn.Module]]:
    """Put only the batch norms in training mode; on exit, put the complete model in eval mode."""
    model.eval()
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.train()
    try:
        yield layers
    finally:
        model.eval()
