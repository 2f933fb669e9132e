"""Channels in a file: which indices of a tensor's dimensions belong to which level. Does not import torch.

Each index of a dimension has a level, the lowest that uses it: 1 to n, or n + 1 if no level does. An element
is available at a level if all of its indices are, so a narrower level is a box of the tensor. The manifest
stores a dimension as runs of indices of one level, pairs (level, count) in ascending order of the indices, or
no run if level 1 has the whole dimension.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, groupby
from operator import mul

import numpy as np

from nestify.file.entry_codec import U8Array, unit_grid
from nestify.file.layout import Shape
from nestify.file.manifest import ParameterEntry, Run

Runs = Sequence[Run]


def axis_runs(levels: Mapping[int, U8Array], dims: int) -> list[list[Run]]:
    """Return the runs of every dimension, as a manifest stores them; empty if level 1 has all indices.

    Args:
        levels: by dimension, uint8 (extent,), the lowest level that uses each index.
        dims: number of dimensions.
    """
    runs = [_runs(levels[dim]) if dim in levels else [] for dim in range(dims)]
    return runs if any(runs) else []


def axis_levels(parameter: ParameterEntry, n_levels: int) -> dict[int, U8Array]:
    """Return the levels of the indices, the inverse of `axis_runs`, for the first `n_levels` levels.

    Returns:
        By dimension with runs, uint8 (extent,); `n_levels + 1` for indices that only higher levels use.
    """
    return {
        dim: np.minimum(_levels(runs), np.uint8(n_levels + 1))
        for dim, runs in enumerate(parameter.axes)
        if runs
    }


def cut_axes(axes: Iterable[Runs], n_levels: int) -> list[list[Run]]:
    """Return the runs of a file's first levels; all higher levels become one level more."""

    def cut_level(run: Run) -> int:
        return min(run[0], n_levels + 1)

    return [
        [(level, sum(count for _, count in run)) for level, run in groupby(runs, cut_level)] for runs in axes
    ]


def available_units(shape: Shape, unit: tuple[int, int], axes: Sequence[Runs], n_levels: int) -> list[int]:
    """Return the number of units of a tensor that are available at each level, core first.

    Args:
        shape: shape of the tensor.
        unit: (rows, cols) of its blocks; (1, 1) if it has axes.
        axes: runs of every dimension, or empty.
        n_levels: number of levels.
    """
    available = [1] * n_levels
    for dim, extent in enumerate(unit_grid(shape, unit)):
        runs = axes[dim] if axes else ()
        available = list(map(mul, available, _counts(runs, n_levels) if runs else [extent] * n_levels))
    return available


def _runs(levels: U8Array) -> list[Run]:
    if not np.any(levels > 1):
        return []
    begins = np.flatnonzero(np.diff(levels, prepend=0))
    counts = np.diff(begins, append=levels.size)
    return list(zip(levels[begins].tolist(), counts.tolist(), strict=True))


def _levels(runs: Runs) -> U8Array:
    levels = np.fromiter((level for level, _ in runs), np.uint8, len(runs))
    return np.repeat(levels, np.fromiter((count for _, count in runs), np.intp, len(runs)))


def _counts(runs: Runs, n_levels: int) -> list[int]:
    """Return the number of indices that each level uses."""
    entering = [0] * (n_levels + 2)
    for level, count in runs:
        entering[level] += count
    return list(accumulate(entering[1:-1]))
