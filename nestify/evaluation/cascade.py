"""Anytime answers: go up the levels until one is sure enough."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nestify.errors import RecipeError
from nestify.evaluation.consensus import Answers

SWEEP = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99, 0.995, 1.0)
"""Thresholds of a curve, from the core level alone to the full level where no other is certain."""


@dataclass(frozen=True)
class Cascade:
    """What came of one threshold.

    Attributes:
        threshold: a level's answer stands where it is at least so sure; the highest level's always does.
        top1: percent of the images that were answered rightly, in the classes of the level that answered.
        shares: of the images that each level answers, core first.
        dense_macs, effective_macs: mean per image, of all levels that ran for it; None if one is not known.
    """

    threshold: float
    top1: float
    shares: Sequence[float]
    dense_macs: float | None
    effective_macs: float | None


@dataclass(frozen=True)
class Climb:
    """How sure every level is of its answer for N images, and whether it is right.

    Attributes:
        sure: (levels, N) largest probability. `right`: (levels, N) bool.
        dense_macs, effective_macs: of every level, core first; None if not known.
    """

    sure: NDArray[np.float64]
    right: NDArray[np.bool_]
    dense_macs: Sequence[int | None]
    effective_macs: Sequence[int | None]

    def at(self, threshold: float) -> Cascade:
        """The cascade that stops where a level is at least so sure."""
        stops = self._stops(threshold)
        counts = np.bincount(stops, minlength=len(self.sure))
        right = self.right[stops, np.arange(stops.size)]
        return Cascade(
            threshold,
            100 * float(right.mean()),
            [float(share) for share in counts / stops.size],
            _mean_cost(self.dense_macs, counts),
            _mean_cost(self.effective_macs, counts),
        )

    def within(self, macs: float) -> Cascade:
        """The cascade of the highest threshold that needs no more effective MACs per image on the mean.

        The threshold is chosen by how sure the levels are of these images; their labels play no part.

        Raises:
            RecipeError: if even the core level alone needs more, or the MACs are not known.
        """
        thresholds = np.unique(np.concatenate([[0.0, 1.0], self.sure[:-1].ravel()]))

        def cost(place: int) -> float:
            found = self.at(float(thresholds[place])).effective_macs
            if found is None:
                raise RecipeError("--cascade macs=...: the file does not know the MACs of its levels")
            return found

        low, high = 0, len(thresholds)
        if cost(0) > macs:
            raise RecipeError(
                f"--cascade macs={macs:,.0f} is below the core level's own {cost(0):,.0f}; allow more"
            )
        while high - low > 1:  # cost never falls as the threshold rises
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle) <= macs else (low, middle)
        return self.at(float(thresholds[low]))

    def _stops(self, threshold: float) -> NDArray[np.int64]:
        """(N,) the place of the level that answers."""
        enough = self.sure >= threshold
        enough[-1] = True
        stops: NDArray[np.int64] = np.argmax(enough, axis=0)
        return stops


def climb(
    answers: Answers,
    temperatures: Sequence[float],
    macs: Sequence[tuple[int | None, int | None]],
) -> Climb:
    """Make a cascade ready.

    Args:
        answers: of levels 1 to n.
        temperatures: of every level; 1 where none was fitted.
        macs: of every level: per image, dense and effective.
    """
    sure, right = [], []
    for level, temperature in enumerate(temperatures, start=1):
        probability, answer = (answers.logits[level].double() / temperature).softmax(-1).max(-1)
        sure.append(probability.numpy())
        right.append((answer == answers.own_target(level)).numpy())
    dense, effective = zip(*macs, strict=True)
    return Climb(np.stack(sure), np.stack(right), dense, effective)


def _mean_cost(macs: Sequence[int | None], counts: NDArray[np.int64]) -> float | None:
    """Of all levels that ran: those up to the one that answered."""
    known = [value for value in macs if value is not None]
    if len(known) < len(macs):
        return None
    return float(np.cumsum(known) @ counts / counts.sum())
