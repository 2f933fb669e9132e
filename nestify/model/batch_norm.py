"""What each level owns: its batch-norm statistics and, by default, its batch-norm scale and shift.

Levels that share batch norm destroy each other's statistics, because the same layer sees other inputs at
each sparsity. Private tensors are small and make nested training work at all.
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
    warnings.simplefilter("ignore")  # fvcore scripts a loss as it is imported, which torch warns about
    from fvcore.nn.precise_bn import update_bn_stats

from nestify.recipe.options import BatchNormMode


def is_statistic_norm(module: nn.Module) -> bool:
    """Whether a module normalises with running statistics, so that its state depends on the level."""
    return isinstance(getattr(module, "running_var", None), Tensor)


def own_names(model: nn.Module, mode: BatchNormMode) -> list[str]:
    """State-dict names of the tensors that each level owns, in module order.

    Args:
        model: the timm model.
        mode: `private`: scale, shift and running statistics; `recalibrate`: the statistics alone.
    """
    names: list[str] = []
    for prefix, module in model.named_modules():
        if not is_statistic_norm(module):
            continue
        tensors: Iterable[tuple[str, Tensor]] = module.named_buffers(recurse=False)
        if mode == "private":
            tensors = [*module.named_parameters(recurse=False), *tensors]
        names += [f"{prefix}.{local}" for local, _ in tensors if local not in _transient(module)]
    return names


def _transient(module: nn.Module) -> set[str]:
    return set(module._non_persistent_buffers_set)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor], n_batches: int) -> int:
    """Recompute the running statistics of a plain model from images, in place.

    The population statistics over all batches (Wu and Johnson, "Rethinking Batch in BatchNorm", 2021,
    section 3), by fvcore; dropout and stochastic depth stay off.

    Args:
        model: a plain model, such as `NestedModel.at_level` gives; left in eval mode.
        batches: image batches of shape (B, C, H, W) on the model's device; gone through again where
            they are fewer than `n_batches`.
        n_batches: how many batches to use.

    Returns:
        Number of batch-norm layers that were recalibrated.
    """
    if isinstance(model, fx.GraphModule):
        return _recalibrate_graph(model, batches, n_batches)
    with _batch_norm_training(model) as layers:
        if layers and n_batches:
            update_bn_stats(model, _endless(batches), num_iters=n_batches)
    return len(layers)


class _Statistics(fx.Interpreter):
    """Runs a network that torch.export made, normalising by the batch, and sums up what its norms see.

    Attributes:
        sums: by the norm's node, mean and mean square of each channel, (channels,) each, over all runs.
    """

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.sums: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is not torch.ops.aten.batch_norm.default:
            return super().run_node(n)
        x, weight, bias, *_, eps, _ = self.fetch_args_kwargs_from_env(n)[0]
        others = [dim for dim in range(x.ndim) if dim != 1]
        mean, square = self.sums.get(n, (0.0, 0.0))
        self.sums[n] = mean + x.mean(others), square + x.square().mean(others)
        return functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def _recalibrate_graph(model: fx.GraphModule, batches: Iterable[Tensor], n_batches: int) -> int:
    """The same for a network that torch.export made."""
    statistics = _Statistics(model)
    for images in islice(_endless(batches), n_batches):
        statistics.run(images)
    for node, (means, squares) in statistics.sums.items():
        mean, variance = (model.get_buffer(str(argument.target)) for argument in _running(node))
        mean.copy_(means / n_batches)
        variance.copy_((squares / n_batches - mean.square()).clamp_min(0))
    return len(statistics.sums)


def _running(norm: fx.Node) -> list[fx.Node]:
    """Running mean and variance among the arguments of a batch norm."""
    return [argument for argument in norm.args[3:5] if isinstance(argument, fx.Node)]


def _endless(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from batches


@contextmanager
def _batch_norm_training(model: nn.Module) -> Iterator[Sequence[nn.Module]]:
    """Put only the batch norms in training mode, and everything in eval mode afterwards."""
    model.eval()
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.train()
    try:
        yield layers
    finally:
        model.eval()
