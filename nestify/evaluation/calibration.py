"""Temperatures and consensus weights of levels, fitted on images that they were not trained on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nestify.evaluation.accuracy import evaluate
from nestify.evaluation.consensus import Predictions, Recorder, pool_log_probabilities
from nestify.model.nested_model import NestedModel

SHARPEST, SOFTEST = 0.05, 20.0
"""Bounds of a temperature; if every image is classified correctly, no temperature is low enough."""

WEAKEST = 1e-3
"""Strength of the penalty towards equal weights, compared with a loss of about 1."""


@dataclass(frozen=True)
class Calibration:
    """The values that are fitted after training.

    Attributes:
        temperatures: per level, core first; its confidence is softmax(logits / temperature).
        weights: per level k, core first, the weights of the log-probabilities of levels 1 to k.
    """

    temperatures: Sequence[float]
    weights: Sequence[Sequence[float]]


def calibrate(predictions: Predictions) -> Calibration:
    """Fit temperatures and weights.

    Args:
        predictions: predictions of all levels for images that they were not trained on.
    """
    levels = sorted(predictions.logits)
    return Calibration(
        [fit_temperature(predictions.logits[level], predictions.own_target(level)) for level in levels],
        [fit_weights(predictions, levels[:k]) for k in range(1, len(levels) + 1)],
    )


def calibrate_levels(
    nested: NestedModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager[object]],
    parents: Mapping[int, Tensor],
) -> Calibration:
    """Fit temperatures and weights of all levels of a nested model, which is left in eval mode.

    Args:
        batches: images (B, C, H, W) that it was not trained on, and class indices (B,).
        autocast: returns the context of a forward pass.
        parents: by level, int64 (classes,): the level's class of each of the data's classes; levels that
            predict the data's own classes are left out.
    """
    nested.eval()
    recorder = Recorder()
    levels = range(1, nested.n_levels + 1)
    models = {level: recorder.record_logits(level, partial(nested, level=level)) for level in levels}
    evaluate(models, recorder.record_targets(batches), autocast, parents)
    return calibrate(recorder.predictions(parents, nested.spec.num_classes))


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """Return the temperature of least cross-entropy.

    Guo et al., "On Calibration of Modern Neural Networks", 2017, section 4.2.

    The cross-entropy is convex in 1 / temperature, so its slope has one root, which bisection finds.

    Args:
        logits: (N, classes).
        target: class indices (N,).

    Returns:
        A temperature from `SHARPEST` to `SOFTEST`.
    """
    logits = logits.double()
    own = logits.gather(1, target[:, None])[:, 0]

    def slope(temperature: float) -> float:
        expected = ((logits / temperature).softmax(-1) * logits).sum(-1)
        return float((expected - own).mean())

    low, high = SHARPEST, SOFTEST
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return float(f"{(low * high) ** 0.5:.6g}")


def fit_weights(predictions: Predictions, levels: Sequence[int]) -> list[float]:
    """Return the weights of the levels' log-probabilities that give the least cross-entropy.

    This is a log-linear pool with one weight per level; the loss is convex in the weights. A weak penalty
    towards equal weights decides where the images do not.

    Args:
        levels: numbers of the levels that take part.
    """
    answers_of = torch.stack([predictions.log_probabilities(level) for level in levels])
    even = torch.full((len(levels),), 1 / len(levels), dtype=torch.float64)
    weights = even.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def loss() -> float:
        optimizer.zero_grad()
        pooled = pool_log_probabilities(answers_of, weights)
        value = (
            torch.nn.functional.nll_loss(pooled, predictions.target)
            + WEAKEST * (weights - even).square().sum()
        )
        value.backward()
        return value.item()

    with torch.enable_grad():
        optimizer.step(loss)
    return [float(f"{weight:.6g}") for weight in weights.tolist()]
