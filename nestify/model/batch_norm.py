"""Batch norm per level: each level has its own statistics and, by default, its own scale and shift.

Levels that share batch norm spoil each other's statistics, because a layer's inputs are distributed
differently at each sparsity. The private tensors are small, and nested training does not work without them.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing fvcore scripts a loss, which torch warns about
    from fvcore.nn.precise_bn import update_bn_stats

from nestify.recipe.options import BatchNormMode


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
def recalibrate(model: nn.Module, batches: Iterable[Tensor], n_batches: int) -> int:
    """Recompute the running statistics of a plain model from images, in place.

    They become the population statistics over all batches (Wu and Johnson, "Rethinking Batch in BatchNorm",
    2021, section 3), computed by fvcore. Dropout and stochastic depth stay off.

    Args:
        model: a plain model, such as `NestedModel.at_level` returns; left in eval mode.
        batches: image batches of shape (B, C, H, W) on the model's device; repeated from the start if
            there are fewer than `n_batches`.
        n_batches: number of batches to use.

    Returns:
        Number of batch-norm layers that were recalibrated.
    """
    if isinstance(model, fx.GraphModule):
        return _recalibrate_graph(model, batches, n_batches)
    with _batch_norm_training(model) as layers:
        if layers and n_batches:
            update_bn_stats(model, _repeat_forever(batches), num_iters=n_batches)
    return len(layers)


class _Statistics(fx.Interpreter):
    """An interpreter of a network made by torch.export that sums up the batch statistics of its norms.

    Every batch norm normalises by the batch.

    Attributes:
        sums: node of a batch norm -> sums over all runs of its input's mean and mean square per channel,
            both of shape (channels,).
    """

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.sums: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is not torch.ops.aten.batch_norm.default:
            return super().run_node(n)
        x, weight, bias, *_, eps, _ = self.fetch_args_kwargs_from_env(n)[0]
        dims = [dim for dim in range(x.ndim) if dim != 1]
        mean, square = self.sums.get(n, (0.0, 0.0))
        self.sums[n] = mean + x.mean(dims), square + x.square().mean(dims)
        return functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def _recalibrate_graph(model: fx.GraphModule, batches: Iterable[Tensor], n_batches: int) -> int:
    """Do the work of `recalibrate` for a network made by torch.export."""
    statistics = _Statistics(model)
    for images in islice(_repeat_forever(batches), n_batches):
        statistics.run(images)
    for node, (means, squares) in statistics.sums.items():
        mean, variance = (model.get_buffer(str(argument.target)) for argument in _running_statistics(node))
        mean.copy_(means / n_batches)
        variance.copy_((squares / n_batches - mean.square()).clamp_min(0))
    return len(statistics.sums)


def _running_statistics(norm: fx.Node) -> list[fx.Node]:
    """Return the arguments of a batch norm that are its running mean and running variance."""
    return [argument for argument in norm.args[3:5] if isinstance(argument, fx.Node)]


def _repeat_forever(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from batches


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
