"""The indices of each tensor that a level keeps, and how a tensor is cut to them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nestify.model.graph.analysis import Analysis
from nestify.model.graph.labels import ChannelLabels, Shape
from nestify.model.graph.union_find import Nodes

Indices = NDArray[np.int64]
"""(kept,) positions that are kept, ascending: indices along a dimension, or units of a group."""

Axes = Mapping[str, Mapping[int, Indices]]
"""Name of a tensor -> dimension -> indices that are kept; an absent dimension is kept in full."""


def _as_tensor(kept: Indices, device: torch.device) -> Tensor:
    return torch.as_tensor(kept, device=device)


def take_indices(
    tensor: Tensor,
    axes: Mapping[int, Indices],
    to_tensor: Callable[[Indices, torch.device], Tensor] = _as_tensor,
) -> Tensor:
    """Cut a tensor to the kept indices of its dimensions; differentiable.

    Args:
        tensor: the full tensor.
        axes: maps each dimension to its kept indices; an absent dimension is kept in full.
        to_tensor: copies indices to a device; a caller that cuts often keeps the copies, because a GPU is
            waited for at each copy.

    Returns:
        A view if the kept indices of every dimension are consecutive, a copy otherwise.
    """
    for dim, kept in axes.items():
        if len(kept) and int(kept[-1]) - int(kept[0]) == len(kept) - 1:
            tensor = tensor.narrow(dim, int(kept[0]), len(kept))
        else:
            tensor = tensor.index_select(dim, to_tensor(kept, tensor.device))
    return tensor


Kept = NDArray[np.bool_]
"""Mask that is True for what is kept."""


class NotABox(ValueError):
    """The kept channels of a tensor are not a product over its dimensions."""


@dataclass(frozen=True)
class Choice:
    """The channels that a level keeps.

    Attributes:
        found: the analysis of the full network.
        kept: (nodes of the analysis,) at each root, whether its set is kept; ignored at other nodes.
    """

    found: Analysis
    kept: Kept

    def kept_along(self, labels: ChannelLabels, dim: int) -> Kept:
        """Return an (extent,) mask of the kept indices along a tensor's dimension.

        Raises:
            NotABox: if the kept indices depend on the index in another dimension.
        """
        block = labels.block_of(dim)
        if block is None:
            return np.ones(labels.shape[dim], dtype=bool)
        box = self.kept[self.found.coupling.sets.roots(block.nodes)]
        sides: list[Kept] = [
            np.logical_or.reduce(np.moveaxis(box, k, 0).reshape(n, -1), axis=1)
            for k, n in enumerate(box.shape)
        ]
        if np.count_nonzero(box) != prod(int(np.count_nonzero(side)) for side in sides):
            raise NotABox
        return sides[block.dims.index(dim % labels.ndim)]

    def count(self, labels: ChannelLabels, dim: int) -> int:
        """Count the kept indices along a tensor's dimension."""
        return int(np.count_nonzero(self.kept_along(labels, dim)))

    def shape(self, labels: ChannelLabels) -> Shape:
        """Return the shape of a tensor in the level."""
        return tuple(self.count(labels, dim) for dim in range(labels.ndim))


def choose(found: Analysis, roots: Sequence[Nodes], kept_units: Sequence[NDArray[np.int64]]) -> Choice:
    """Keep some units of every group, and all channels that are in no group.

    Args:
        found: the analysis of the full network.
        roots: per group, the (units,) roots of its units.
        kept_units: per group, the positions of the units to keep.
    """
    kept = np.ones(len(found.coupling.sets), dtype=bool)
    for group, units in zip(roots, kept_units, strict=True):
        kept[group] = False
        kept[group[units]] = True
    return Choice(found, kept)
