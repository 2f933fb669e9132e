"""Batch norm that normalises by the images of all processes, during training.

torch's SyncBatchNorm runs on GPUs only, and does not exist in the traced graphs of narrower levels. Here one
function stands in for batch norm in both: in modules by their class, in graphs by the target of a node.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, distributed, fx
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from nestify.errors import UnsupportedModelError
from nestify.model.nested_model import NestedModel
from nestify.training.distributed import World, collective

_BATCH_NORM = torch.ops.aten.batch_norm.default


@contextmanager
def synced_batch_norm(nested: NestedModel, world: World) -> Iterator[None]:
    """Let batch norms use the statistics of all processes until the end of the block.

    Args:
        nested: the model; its network and the graphs of its smaller levels are changed, and restored.
        world: the processes of the run; nothing changes for a single one.

    Raises:
        UnsupportedModelError: if a batch norm of the network computes in its own way.
    """
    if world.size == 1:
        yield
        return
    modules = [module for module in nested.modules() if isinstance(module, _BatchNorm)]
    nodes = [node for graph in _training_graphs(nested) for node in graph.graph.nodes]
    nodes = [node for node in nodes if node.target is _BATCH_NORM]
    originals = [type(module) for module in modules]
    synced = {kind: _synced_class(kind) for kind in set(originals)}
    classes = [synced[kind] for kind in originals]
    try:
        _set_classes(modules, classes)
        _set_targets(nested, nodes, batch_norm)
        yield
    finally:
        _set_classes(modules, originals)
        _set_targets(nested, nodes, _BATCH_NORM)


def _training_graphs(nested: NestedModel) -> list[fx.GraphModule]:
    """Return the networks in which the smaller levels are trained."""
    device = next(nested.parameters()).device
    levels = range(1, nested.n_levels + 1)
    if nested.level_sizes is None:
        return []
    return [
        nested.level_sizes.skeleton(level, training=True, device=device)
        for level in levels
        if nested.is_smaller(level)
    ]


def _set_classes(modules: list[Any], classes: list[type]) -> None:
    for module, kind in zip(modules, classes, strict=True):
        module.__class__ = kind


def _set_targets(nested: NestedModel, nodes: list[fx.Node], target: Any) -> None:
    for node in nodes:
        node.target = target
    for graph in _training_graphs(nested):
        graph.recompile()


def _synced_class(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    """Return a subclass of a batch norm whose training uses the images of all processes."""
    if kind.forward not in (_BatchNorm.forward, BatchNormAct2d.forward):
        raise UnsupportedModelError(
            f"train.sync_batch_norm = true: {kind.__name__} computes batch norm in its own way; leave it out"
        )

    def forward(self: Any, x: Tensor) -> Tensor:
        if not (self.training and self.track_running_stats):
            own: Tensor = kind.forward(self, x)
            return own
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        statistics = self.running_mean, self.running_var
        x = batch_norm(x, self.weight, self.bias, *statistics, True, momentum, self.eps, True)
        output: Tensor = x if kind.forward is _BatchNorm.forward else self.act(self.drop(x))
        return output

    return type(f"Synced{kind.__name__}", (kind,), {"forward": forward})


@torch.compiler.disable  # type: ignore[untyped-decorator]
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Compute torch's batch norm; in training by the mean and variance over the images of all processes.

    Args:
        x: (B, channels, ...).
        weight, bias: (channels,); None for 1 and 0.
        running_mean, running_var: (channels,), updated in training; None for none.
        training: whether to normalise by the batch.
        momentum: weight of the batch in the running statistics.
        eps: is added to the variance.
        cudnn_enabled: has no effect here.
    """
    if not training:
        return functional.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    normalised, mean, variance, count = _Normalise.apply(x, eps)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp_min(1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    if weight is not None:
        normalised = normalised * weight.view(shape)
    if bias is not None:
        normalised = normalised + bias.view(shape)
    output: Tensor = normalised.to(x.dtype)
    return output


class _Normalise(torch.autograd.Function):
    """Subtract the mean over all processes and divide by the standard deviation, per channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the normalised input, the mean and biased variance (channels,), and the number of values."""
        dims, shape = _other_dims(x)
        values = x.float()
        variance, mean = torch.var_mean(values, dims, correction=0)
        count = values.new_full((1,), x.numel() / x.shape[1])  # new_tensor would wait for the device
        own = torch.cat([mean, variance, count])
        parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        with collective():
            distributed.all_gather(parts, own)
        means, variances, counts = torch.stack(parts).split([len(mean), len(mean), 1], dim=1)
        total = counts.sum()
        shares = counts / total
        mean = (shares * means).sum(0)
        # the variance within the processes, and that of their means (Chan et al., 1983, eq. 2.1)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        scale = torch.rsqrt(variance + eps)
        normalised = (values - mean.view(shape)) * scale.view(shape)
        ctx.save_for_backward(normalised, scale, total)
        ctx.mark_non_differentiable(mean, variance, total)
        return normalised.to(x.dtype), mean, variance, total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the input; the mean and variance depend on the inputs of all processes."""
        normalised, scale, total = ctx.saved_tensors
        dims, shape = _other_dims(gradient)
        values = gradient.float()
        sums = torch.cat([values.sum(dims), (values * normalised).sum(dims)])
        with collective():
            distributed.all_reduce(sums)
        along, across = (sums / total).chunk(2)
        values = values - along.view(shape) - normalised * across.view(shape)
        return (values * scale.view(shape)).to(gradient.dtype), None


def _other_dims(x: Tensor) -> tuple[list[int], tuple[int, ...]]:
    """Return the dimensions that are not the channels', and the shape of one value per channel."""
    return [dim for dim in range(x.ndim) if dim != 1], (1, -1, *(1,) * (x.ndim - 2))
