"""Axes: which indices of which tensors are kept, how a tensor is cut to them, how they are put in order."""

from collections.abc import Mapping, Sequence
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
"""(kept,) places that are kept, ascending: indices of a dimension, or units of a group."""

Axes = Mapping[str, Mapping[int, Indices]]
"""Name of a tensor -> dimension -> indices that are kept; a dimension that is absent is whole."""


def sliced(tensor: Tensor, axes: Mapping[int, Indices]) -> Tensor:
    """Cut a tensor to the indices that are kept of its dimensions; differentiable.

    Returns:
        a view where the kept indices of every dimension follow each other, a copy otherwise.
    """
    for dim, kept in axes.items():
        if len(kept) and int(kept[-1]) - int(kept[0]) == len(kept) - 1:
            tensor = tensor.narrow(dim, int(kept[0]), len(kept))
        else:
            tensor = tensor.index_select(dim, torch.as_tensor(kept, device=tensor.device))
    return tensor


Kept = NDArray[np.bool_]


class NotABox(ValueError):
    """The kept channels of a tensor are not a product over its dimensions."""


@dataclass(frozen=True)
class Choice:
    """What a level keeps.

    Attributes:
        kept: (nodes of the analysis,) whether the set of each root stays; what is no root does not count.
    """

    found: Analysis
    kept: Kept

    def along(self, labels: ChannelLabels, dim: int) -> Kept:
        """(extent,) which indices of a tensor's dimension stay.

        Raises:
            NotABox: if that depends on the index in another dimension.
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
        """How many indices of a tensor's dimension stay."""
        return int(np.count_nonzero(self.along(labels, dim)))

    def shape(self, labels: ChannelLabels) -> Shape:
        """What a tensor's shape becomes."""
        return tuple(self.count(labels, dim) for dim in range(labels.ndim))


def choose(found: Analysis, roots: Sequence[Nodes], kept_units: Sequence[NDArray[np.int64]]) -> Choice:
    """Keep some units of every group, and all that is in no group.

    Args:
        roots: of each group's units. `kept_units`: which of them stay, by position.
    """
    kept = np.ones(len(found.coupling.sets), dtype=bool)
    for group, units in zip(roots, kept_units, strict=True):
        kept[group] = False
        kept[group[units]] = True
    return Choice(found, kept)
