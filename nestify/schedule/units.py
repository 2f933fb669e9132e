"""Units: the weights that a pattern keeps or drops together."""

from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from nestify.recipe.levels import Pattern


class Units:
    """The units of one weight; a pattern keeps or drops the weights of a unit together.

    Attributes:
        shape: the weight's shape.
        rows: output channels of a block; 1 if units are single weights.
        cols: input channels of a block; 1 if units are single weights.
        sizes: number of weights of each unit, int64 (units,), smaller for blocks cut off at the edges. None:
            units are single weights.
        available: the lowest level that can use each unit, uint8 (units,). None: level 1 can use all.
    """

    def __init__(self, weight: Tensor, pattern: Pattern, available: Tensor | None = None) -> None:
        self.shape = weight.shape
        self.rows, self.cols = pattern.rows, pattern.cols
        self._weight = weight.detach()
        self.sizes: Tensor | None = None
        if pattern.kind == "block":
            self.sizes = self._reduce(torch.ones_like(self._weight).float()).long().flatten()
        self.available = None if available is None else available.flatten()
        if available is not None and self.sizes is not None:
            self.available = (self._reduce(available.long()).flatten() // self.sizes).to(torch.uint8)

    def energy(self) -> Tensor:
        """Compute the mean squared weight of each unit, float32 (units,)."""
        squared = self._weight.float().square()
        if self.sizes is not None:
            squared = self._reduce(squared).flatten() / self.sizes
        return squared.flatten()

    def _reduce(self, tensor: Tensor) -> Tensor:
        """Sum over blocks: (out, in, *kernel) -> (ceil(out / rows), ceil(in / cols), prod(kernel))."""
        grid = tensor.reshape(self.shape[0], self.shape[1], -1)  # (O, I, K)
        down, across = -self.shape[0] % self.rows, -self.shape[1] % self.cols
        grid = functional.pad(grid, (0, 0, 0, across, 0, down))
        blocks: Tensor = grid.unflatten(1, (-1, self.cols)).unflatten(0, (-1, self.rows))
        return blocks.sum((1, 3))

    def expand(self, entry: Tensor) -> Tensor:
        """Expand entry levels of the units, (units,), to those of the weights, in the weight's shape."""
        if self.sizes is None:
            return entry.view(self.shape)
        grid = entry.view(-(-self.shape[0] // self.rows), -(-self.shape[1] // self.cols), -1)
        grid = grid.repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 1)
        return grid[: self.shape[0], : self.shape[1]].reshape(self.shape).contiguous()

    def count_usable(self, level: int) -> int:
        """Count the weights that a level can use."""
        if self.available is None:
            return prod(self.shape)
        usable = self.available <= level
        return int(usable.sum() if self.sizes is None else self.sizes[usable].sum())
