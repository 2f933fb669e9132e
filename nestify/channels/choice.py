"""Which channels one level keeps, and the sizes that every tensor of the graph has with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from nestify.channels.analysis import Analysis
from nestify.channels.labels import Labels, Shape
from nestify.channels.union_find import Nodes

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

    def along(self, labels: Labels, dim: int) -> Kept:
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

    def count(self, labels: Labels, dim: int) -> int:
        """How many indices of a tensor's dimension stay."""
        return int(np.count_nonzero(self.along(labels, dim)))

    def shape(self, labels: Labels) -> Shape:
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
