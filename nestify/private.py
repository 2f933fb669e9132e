"""What each level owns: its batch-norm statistics and, by default, its batch-norm scale and shift.

Levels that share batch norm destroy each other's statistics, because the same layer sees other inputs at
each sparsity. Private tensors are small and make nested training work at all.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fvcore scripts a loss as it is imported, which torch warns about
    from fvcore.nn.precise_bn import update_bn_stats

BatchNormMode = Literal["private", "recalibrate"]


def is_statistic_norm(module: nn.Module) -> bool:
    """Whether a module normalises with running statistics, so that its state depends on the level."""
    return isinstance(getattr(module, "running_var", None), Tensor)


def private_names(model: nn.Module, mode: BatchNormMode) -> list[str]:
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
    with _batch_norm_training(model) as layers:
        if layers and n_batches:
            update_bn_stats(model, _endless(batches), num_iters=n_batches)
    return len(layers)


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
