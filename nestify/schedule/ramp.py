"""Gradual sparsity: how sparse each level is while it learns, and when its weights are chosen again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from nestify.recipe.levels import Level


@dataclass
class Ramp:
    """Raises every level's sparsity from 0 to its target, then freezes the entry levels.

    s(t) = s_target * (1 - (1 - t / T)^3) (Zhu and Gupta, "To prune, or not to prune", 2017, equation 1,
    from sparsity 0).

    Attributes:
        levels: the targets, core level first; once they are settled, as they came out.
        steps: training steps T until the targets are reached; 0 starts at the targets.
        selections: how often the weights are chosen again on the way, evenly spaced.
        settle: gives the targets anew where they are reached, by the weights as they are then.
    """

    levels: Sequence[Level]
    steps: int
    selections: int
    settle: Callable[[], Sequence[Level]] | None = None

    def due(self, step: int) -> bool:
        """Whether the weights are chosen again before training step `step` (counted from 0)."""
        if step >= self.steps:
            return step == self.steps
        return step % max(1, ceil(self.steps / max(1, self.selections))) == 0

    def levels_at(self, step: int) -> list[Level]:
        """The levels with the sparsities of this step; an N:M level keeps whole numbers of each M."""
        if step >= self.steps:
            if self.settle is not None:
                self.levels, self.settle = self.settle(), None
            return list(self.levels)
        rest = 1 - step / self.steps
        return [_at(level, level.sparsity * (1 - rest**3)) for level in self.levels]

    def settled(self) -> list[float] | None:
        """The sparsities that the levels have settled at, core first; None where they have not yet."""
        return [level.sparsity for level in self.levels] if self.settle is None else None

    def settle_at(self, sparsities: Sequence[float]) -> None:
        """Take over the sparsities that the levels have settled at in an earlier part of the training.

        Raises:
            ValueError: if there is not one for each level.
        """
        pairs = zip(self.levels, sparsities, strict=True)
        self.levels, self.settle = [replace(level, sparsity=value) for level, value in pairs], None


def _at(level: Level, sparsity: float) -> Level:
    pattern = level.pattern
    if pattern.kind == "n:m" and level.sparsity > 0:
        kept = ceil((1 - sparsity) * pattern.m - 1e-9)
        pattern = replace(pattern, n=kept)
        sparsity = 1 - kept / pattern.m
    return replace(level, sparsity=sparsity, pattern=pattern)
