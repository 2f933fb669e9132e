"""Cascade: for each image, run levels from the core upwards until one is confident enough."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nestify.errors import RecipeError
from nestify.evaluation.consensus import Predictions

SWEEP = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99, 0.995, 1.0)
"""Thresholds of a sweep, from the core level alone to the full level unless a lower one is certain."""


@dataclass(frozen=True)
class Cascade:
    """Accuracy and cost of a cascade with one threshold.

    Attributes:
        threshold: confidence at which a level's prediction is used; the highest level's always is.
        top1: percent of the images that are classified correctly, in the classes of the level that is used.
        shares: per level, core first, the share of the images for which it is used.
        dense_macs: mean MACs per image of all levels that ran for it; None if one is not known.
        effective_macs: the same for effective MACs.
    """

    threshold: float
    top1: float
    shares: Sequence[float]
    dense_macs: float | None
    effective_macs: float | None


@dataclass(frozen=True)
class CascadePredictions:
    """Confidence of every level for N images, and whether it is correct.

    Attributes:
        confidence: (levels, N), the largest probability.
        correct: (levels, N), bool.
        dense_macs: MACs of every level, core first; None if not known.
        effective_macs: effective MACs of every level, core first; None if not known.
    """

    confidence: NDArray[np.float64]
    correct: NDArray[np.bool_]
    dense_macs: Sequence[int | None]
    effective_macs: Sequence[int | None]

    def at_threshold(self, threshold: float) -> Cascade:
        """Return the cascade that stops at the first level with at least this confidence."""
        stops = self._stops(threshold)
        counts = np.bincount(stops, minlength=len(self.confidence))
        correct = self.correct[stops, np.arange(stops.size)]
        return Cascade(
            threshold,
            100 * float(correct.mean()),
            [float(share) for share in counts / stops.size],
            _mean_cost(self.dense_macs, counts),
            _mean_cost(self.effective_macs, counts),
        )

    def within_budget(self, macs: float) -> Cascade:
        """Return the cascade with the highest threshold whose mean effective MACs are within a budget.

        The threshold is chosen by the confidences for these images; their labels are not used.

        Raises:
            RecipeError: if even the core level alone needs more, or the MACs are not known.
        """
        thresholds = np.unique(np.concatenate([[0.0, 1.0], self.confidence[:-1].ravel()]))

        def cost(place: int) -> float:
            found = self.at_threshold(float(thresholds[place])).effective_macs
            if found is None:
                raise RecipeError("--cascade macs=...: the file does not know the MACs of its levels")
            return found

        low, high = 0, len(thresholds)
        if cost(0) > macs:
            raise RecipeError(
                f"--cascade macs={macs:,.0f} is below the core level's own {cost(0):,.0f}; allow more"
            )
        while high - low > 1:  # the cost never falls as the threshold rises
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle) <= macs else (low, middle)
        return self.at_threshold(float(thresholds[low]))

    def _stops(self, threshold: float) -> NDArray[np.int64]:
        """Return (N,), the index of the level that is used."""
        enough = self.confidence >= threshold
        enough[-1] = True
        stops: NDArray[np.int64] = np.argmax(enough, axis=0)
        return stops


def prepare_cascade(
    predictions: Predictions,
    temperatures: Sequence[float],
    macs: Sequence[tuple[int | None, int | None]],
) -> CascadePredictions:
    """Prepare a cascade from the predictions of levels 1 to n.

    Args:
        predictions: predictions of levels 1 to n.
        temperatures: temperature of every level; 1 if none was fitted.
        macs: dense and effective MACs per image of every level.
    """
    confidence, correct = [], []
    for level, temperature in enumerate(temperatures, start=1):
        probability, answer = (predictions.logits[level].double() / temperature).softmax(-1).max(-1)
        confidence.append(probability.numpy())
        correct.append((answer == predictions.own_target(level)).numpy())
    dense, effective = zip(*macs, strict=True)
    return CascadePredictions(np.stack(confidence), np.stack(correct), dense, effective)


def _mean_cost(macs: Sequence[int | None], counts: NDArray[np.int64]) -> float | None:
    """Return the mean cost of all levels that ran, up to the one that is used."""
    known = [value for value in macs if value is not None]
    if len(known) < len(macs):
        return None
    return float(np.cumsum(known) @ counts / counts.sum())
