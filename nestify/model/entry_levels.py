"""Entry levels: which levels use each weight, defined only here.

Every maskable weight has one small integer, its entry level: the lowest level that uses it, or n + 1 if no
level does. Level k uses a weight when `entry <= k`, so a higher level contains every weight of the lower
levels whatever the integers are. Only their range has to be checked, never the nesting.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nestify.recipe.levels import MAX_LEVELS


def entry_mask(entry: Tensor, level: int) -> Tensor:
    """Return the mask of one tensor at a level: bool, in the shape of `entry`."""
    return entry <= level


@dataclass(frozen=True)
class EntryLevels:
    """Entry levels of all maskable tensors.

    Attributes:
        n_levels: number of levels n.
        tensors: parameter name -> uint8 in the parameter's shape, values in 1..n + 1.

    Raises:
        ValueError: on construction, if a tensor is not uint8 or a value is out of range.
    """

    n_levels: int
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not 1 <= self.n_levels <= MAX_LEVELS:
            raise ValueError(f"a nested model has 1 to {MAX_LEVELS} levels, not {self.n_levels}")
        for name, entry in self.tensors.items():
            if entry.dtype != torch.uint8:
                raise ValueError(f"entry levels of {name!r} are {entry.dtype}, not torch.uint8")
            if entry.numel() and not (int(entry.min()) >= 1 and int(entry.max()) <= self.n_levels + 1):
                raise ValueError(f"entry levels of {name!r} are not in 1..{self.n_levels + 1}")

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    @property
    def total(self) -> int:
        """Number of maskable weights."""
        return sum(entry.numel() for entry in self.tensors.values())

    def count_kept(self, level: int, name: str | None = None) -> int:
        """Count the weights that a level uses, in the tensor `name` or, with None, in all tensors."""
        tensors = self.tensors.values() if name is None else [self.tensors[name]]
        return sum(int(torch.count_nonzero(entry_mask(entry, level))) for entry in tensors)

    def sparsity(self, level: int) -> float:
        """Return the share of the maskable weights that a level does not use, in [0, 1]."""
        return 1 - self.count_kept(level) / self.total if self.total else 0.0


@dataclass(frozen=True)
class NestedState:
    """The tensors of a nested network, independent of any module.

    Attributes:
        shared: timm's state-dict name -> dense tensor that all levels share (parameters and persistent
            buffers; one name per group of tied tensors). In a model, a masked-out weight may have any
            value; after reading a file, a weight that no stored level uses is zero.
        entry: entry levels of the maskable tensors in `shared`.
        private: one dict per level, core first: state-dict name -> tensor that the level owns.
        aliases: tied name -> the name in `shared` that holds the tensor.
        units: name of a maskable tensor -> (rows, cols) of the blocks in which its entry levels are
            constant; absent means (1, 1).
        axes: name of a maskable tensor -> dimension -> uint8 (extent,), the lowest level that has each
            index, or n + 1 if no level has it; absent means that level 1 has the full dimension. A level
            uses a weight only if it has all of the weight's indices, so no weight enters before them.
        skipped: per level, core first, the names of the blocks that it skips; an empty list if no level
            skips any.
    """

    shared: dict[str, Tensor]
    entry: EntryLevels
    private: list[dict[str, Tensor]]
    aliases: dict[str, str] = field(default_factory=dict)
    units: dict[str, tuple[int, int]] = field(default_factory=dict)
    axes: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    skipped: list[list[str]] = field(default_factory=list)


def box_levels(shape: Sequence[int], levels: Mapping[int, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return, for each element of a tensor, the lowest level that has all of the element's indices.

    Args:
        shape: the tensor's shape.
        levels: dimension -> uint8 (extent,), the lowest level that has each index; for a dimension that is
            left out, level 1 has every index.

    Returns:
        uint8 in `shape`.
    """
    box = np.ones(shape, np.uint8)
    for dim, entry in levels.items():
        np.maximum(box, entry.reshape([-1 if axis == dim else 1 for axis in range(len(shape))]), out=box)
    return box
