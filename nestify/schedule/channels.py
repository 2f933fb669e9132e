"""Channels: how many units of each coupled group a level has, and which matter most."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import make_divisible
from torch import Tensor

from nestify.model.graph.groups import Group
from nestify.recipe.levels import Level

GRID = 1000
"""Widths that a budget chooses among."""


def channel_counts(groups: Sequence[Group], levels: Sequence[Level], divisor: int) -> list[tuple[int, ...]]:
    """Units of each group that each level has, core first.

    A level of width w has about w of the units of every group: a multiple of `divisor` where a unit is one
    channel, whole units (heads, groups) elsewhere, and never less than 0.9 * w where that can be had.

    Args:
        groups: the coupled channels.
        levels: core first, widths not falling; width 1 has all units.
        divisor: of the number of channels.
    """
    counts: list[tuple[int, ...]] = []
    for level in levels:
        wanted = [_count(group, level.width, divisor) for group in groups]
        if counts:  # rounding must not take away what a lower level has
            wanted = [max(pair) for pair in zip(wanted, counts[-1], strict=True)]
        counts.append(tuple(wanted))
    return counts


def channel_path(groups: Sequence[Group], divisor: int) -> list[tuple[float, tuple[int, ...]]]:
    """All channel counts from the narrowest network to the full one, one group growing at a time.

    Where one width lets several groups grow, they grow one after the other, so that a budget can be met more
    closely than by a width alone.

    Returns:
        width and units of each group, none falling; the last is the full network.
    """
    widths = [step / GRID for step in range(1, GRID + 1)]
    rows = np.array([[_count(group, width, divisor) for group in groups] for width in widths])
    rows = np.maximum.accumulate(rows)
    path = [(widths[0], tuple(rows[0].tolist()))]
    for width, row in zip(widths, rows, strict=True):
        counts = list(path[-1][1])
        for place in np.flatnonzero(row > counts):
            counts[place] = int(row[place])
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
    """Units of every group from the most to the least important; (units,) each.

    A unit's importance is the squared norm of the weights that belong to it, each weight tensor of the group
    scaled to a mean of 1 over the units, so that no tensor counts for more because its weights are larger.

    Args:
        groups: the coupled channels.
        tensors: parameters and buffers of the network by state-dict name.
    """
    return [np.argsort(-_importance(group, tensors), kind="stable") for group in groups]


def _importance(group: Group, tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
    total = np.zeros(group.units)
    for member in group.members:
        weight = tensors.get(member.name)
        if weight is None or weight.ndim < 2 or not weight.is_floating_point():
            continue
        along = weight.detach().double().square().transpose(0, member.dim).flatten(1).sum(1).cpu().numpy()
        energy = along[member.indices].sum(1)
        total += energy / max(float(energy.mean()), np.finfo(np.float64).tiny)
    return total
