"""Entry levels: the one place that says which weight belongs to which level.

A maskable weight has one small integer, its entry level: the lowest level that uses it, n + 1 where no
level does. Level k uses a weight when `entry <= k`, so a higher level contains every weight of the lower
ones whatever the integers are: nestedness needs no check, only the range does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
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
