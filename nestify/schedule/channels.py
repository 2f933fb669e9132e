"""Channels: how many units of each coupled group a level has, and which units are most important."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import make_divisible
from torch import Tensor

from nestify.accelerator import as_float64
from nestify.model.graph.groups import Group
from nestify.recipe.levels import Level

WIDTH_STEPS = 1000
"""Number of widths from which a budget chooses."""


def channel_counts(groups: Sequence[Group], levels: Sequence[Level], divisor: int) -> list[tuple[int, ...]]:
    """Return the number of units of each group that each level has, core first.

    A level of width w has about a share w of the units of every group, and at least 0.9 * w if possible. If
    a unit is one channel, the number is a multiple of `divisor`; larger units (heads, groups) stay complete.

    Args:
        groups: the coupled channels.
        levels: core first, widths not decreasing; a level of width 1 has all units.
        divisor: the number that the channel counts should be multiples of.
    """
    counts: list[tuple[int, ...]] = []
    for level in levels:
        wanted = [_count(group, level.width, divisor) for group in groups]
        if counts:  # rounding must not remove units that a lower level has
            wanted = [max(pair) for pair in zip(wanted, counts[-1], strict=True)]
        counts.append(tuple(wanted))
    return counts


def channel_path(groups: Sequence[Group], divisor: int) -> list[tuple[float, tuple[int, ...]]]:
    """Return all channel counts from the narrowest network to the full one; one group grows at a time.

    If several groups grow at the same width, they grow one after the other, so that a budget can be met more
    closely than by the width alone.

    Args:
        groups: the coupled channels.
        divisor: the number that the channel counts should be multiples of.

    Returns:
        Pairs of width and number of units of each group, never decreasing; the last is the full network.
    """
    widths = [step / WIDTH_STEPS for step in range(1, WIDTH_STEPS + 1)]
    rows = np.array([[_count(group, width, divisor) for group in groups] for width in widths])
    rows = np.maximum.accumulate(rows)
    path = [(widths[0], tuple(rows[0].tolist()))]
    for width, row in zip(widths, rows, strict=True):
        counts = list(path[-1][1])
        for index in np.flatnonzero(row > counts):
            counts[index] = int(row[index])
            path.append((width, tuple(counts)))
    return path


def _count(group: Group, width: float, divisor: int) -> int:
    if width == 1:
        return group.units
    per_unit = min(member.indices.shape[1] for member in group.members)
    step = max(1, divisor // per_unit)
    if group.units < 2 * step:
        step = 1
    return min(group.units, int(make_divisible(width * group.units, step)))


@torch.no_grad()
def importance_orders(groups: Sequence[Group], tensors: Mapping[str, Tensor]) -> list[NDArray[np.int64]]:
    """Return the units of every group in order of importance, the most important first; (units,) each.

    Groups that the model's outputs have channels of keep their order, so that the outputs stay the same.

    A unit's importance is the squared norm of its weights, those of norm layers and layer scales included:
    batch norm takes away the scale of the weights before it, and gives the channel that of its own weight.
    Each tensor of the group is scaled to a mean of 1 over the units, so that a tensor with larger weights
    does not count for more. (Magnitude importance of coupled groups, with norms: Fang et al., "DepGraph:
    Towards Any Structural Pruning", 2023, section 3.3.)

    Args:
        groups: the coupled channels.
        tensors: state-dict name -> parameter or buffer of the network.
    """
    return [
        np.arange(group.units) if group.in_output else np.argsort(-_importance(group, tensors), kind="stable")
        for group in groups
    ]


def _importance(group: Group, tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
    total = np.zeros(group.units)
    for member in group.members:
        weight = tensors.get(member.name)
        if weight is None or not weight.is_floating_point() or not _scales(member.name, weight):
            continue
        squares = as_float64(weight.detach()).square().movedim(member.dim, 0)
        energy = squares.reshape(len(squares), -1).sum(1).cpu().numpy()[member.indices].sum(1)
        total += energy / max(float(energy.mean()), np.finfo(np.float64).tiny)
    return total


def _scales(name: str, tensor: Tensor) -> bool:
    """Return whether a network multiplies by a tensor: not a bias, nor a statistic of a batch norm."""
    last = name.rpartition(".")[2]
    return tensor.ndim >= 2 or not (last.endswith(("bias", "beta")) or last.startswith("running_"))
