"""Entry levels: the one place that says which weight belongs to which level.

A maskable weight has one small integer, its entry level: the lowest level that uses it, n + 1 where no
level does. Level k uses a weight when `entry <= k`, so a higher level contains every weight of the lower
ones whatever the integers are: nestedness needs no check, only the range does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nestify.recipe.levels import MAX_LEVELS


def entry_mask(entry: Tensor, level: int) -> Tensor:
    """Mask of one tensor at a level, bool of the entry tensor's shape."""
    return entry <= level


@dataclass(frozen=True)
class EntryLevels:
    """Entry levels of all maskable tensors.

    Attributes:
        n_levels: number of levels n.
        tensors: by parameter name, uint8 of the parameter's shape, values in 1..n + 1.

    Raises:
        ValueError: on construction, for a tensor that is not uint8 or a value out of range.
    """

    n_levels: int
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not 1 <= self.n_levels <= MAX_LEVELS:
            raise ValueError(f"{self.n_levels} levels; 1 to {MAX_LEVELS} can be held")
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

    def kept(self, level: int, name: str | None = None) -> int:
        """Number of weights that level `level` uses, in one tensor or in all."""
        tensors = self.tensors.values() if name is None else [self.tensors[name]]
        return sum(int(torch.count_nonzero(entry_mask(entry, level))) for entry in tensors)

    def sparsity(self, level: int) -> float:
        """Share of the maskable weights that level `level` does not use, in [0, 1]."""
        return 1 - self.kept(level) / self.total if self.total else 0.0


@dataclass(frozen=True)
class NestedState:
    """The tensors of a nested network, independent of any module.

    Attributes:
        shared: by timm's state-dict name, dense tensors that all levels share (parameters and
            persistent buffers; one name per tied group). A masked-out weight may hold any value in a
            model; after reading a file it is zero where no stored level uses it.
        entry: entry levels of the maskable ones among `shared`.
        private: one dict per level, core first: by state-dict name, tensors that the level owns.
        aliases: tied name -> the name in `shared` that holds the tensor.
        units: name of a maskable tensor -> (rows, cols) of the blocks in which its entry levels are
            constant; absent means (1, 1).
        axes: name of a maskable tensor -> dimension -> uint8 (extent,), the lowest level that has each
            index, n + 1 where no level does; absent means that level 1 has the whole dimension. A level
            uses no weight of which it lacks an index, so no weight enters before all of its indices.
        skipped: per level, core first: names of the blocks that it leaves out; empty if none does.
    """

    shared: dict[str, Tensor]
    entry: EntryLevels
    private: list[dict[str, Tensor]]
    aliases: dict[str, str] = field(default_factory=dict)
    units: dict[str, tuple[int, int]] = field(default_factory=dict)
    axes: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    skipped: list[list[str]] = field(default_factory=list)


def box_levels(shape: Sequence[int], levels: Mapping[int, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Level at which every element becomes available, uint8 of `shape`: that of its latest index.

    Args:
        shape: of the tensor.
        levels: as for `axis_runs`.
    """
    box = np.ones(shape, np.uint8)
    for dim, along in levels.items():
        np.maximum(box, along.reshape([-1 if axis == dim else 1 for axis in range(len(shape))]), out=box)
    return box
