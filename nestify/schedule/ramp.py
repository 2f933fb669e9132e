"""Gradual sparsity: the sparsity of each level at each training step, and when weights are chosen again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from nestify.recipe.levels import Level


@dataclass
class Ramp:
    """A ramp that raises every level's sparsity from 0 to its target, after which the entry levels are fixed.

    s(t) = s_target * (1 - (1 - t / T)^3) (Zhu and Gupta, "To prune, or not to prune", 2017, equation 1,
    with initial sparsity 0).

    Attributes:
        levels: the levels with their target sparsities, core first; replaced once by those of `settle`.
        steps: number of training steps T until the targets are reached; 0 starts at the targets.
        selections: how often the weights are chosen again before that, at even intervals.
        settle: a function that solves the targets again for the weights at step T; None if the targets are
            final, also after it was called.
        frozen: number of levels, from the core on, that have their target sparsities from the start.
    """

    levels: Sequence[Level]
    steps: int
    selections: int
    settle: Callable[[], Sequence[Level]] | None = None
    frozen: int = 0

    def is_due(self, step: int) -> bool:
        """Whether the weights are chosen again before training step `step` (counted from 0)."""
        if step >= self.steps:
            return step == self.steps
        return step % max(1, ceil(self.steps / max(1, self.selections))) == 0

    def levels_at(self, step: int) -> list[Level]:
        """Return the levels with the sparsities of a step; an N:M level keeps a whole number of each M.

        At the end of the ramp the targets are solved again if there is a function for it.
        """
        if step >= self.steps:
            if self.settle is not None:
                self.levels, self.settle = self.settle(), None
            return list(self.levels)
        rest = 1 - step / self.steps
        rising = [_with_sparsity(level, level.sparsity * (1 - rest**3)) for level in self.levels]
        return [*self.levels[: self.frozen], *rising[self.frozen :]]

    def final_sparsities(self) -> list[float] | None:
        """Return the final target sparsities, core first; None if they are yet to be solved."""
        return [level.sparsity for level in self.levels] if self.settle is None else None

    def set_sparsities(self, sparsities: Sequence[float], *, final: bool) -> None:
        """Set the target sparsities, core first, as an earlier part of the training solved them.

        Args:
            sparsities: the targets.
            final: whether they are not to be solved again.

        Raises:
            ValueError: if there is not one sparsity for each level.
        """
        pairs = zip(self.levels, sparsities, strict=True)
        self.levels = [replace(level, sparsity=value) for level, value in pairs]
        if final:
            self.settle = None


def _with_sparsity(level: Level, sparsity: float) -> Level:
    pattern = level.pattern
    if pattern.kind == "n:m" and level.sparsity > 0:
        kept = ceil((1 - sparsity) * pattern.m - 1e-9)
        pattern = replace(pattern, n=kept)
        sparsity = 1 - kept / pattern.m
    return replace(level, sparsity=sparsity, pattern=pattern)
