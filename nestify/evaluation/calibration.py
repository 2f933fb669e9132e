"""How sure a level is, and how much its answer counts: fitted on images that it has not learned from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nestify.evaluation.accuracy import evaluate
from nestify.evaluation.consensus import Answers, Recorder, combined
from nestify.model.nested_model import NestedModel

SHARPEST, SOFTEST = 0.05, 20.0
"""Bounds of a temperature: where every image is answered rightly, no temperature is sharp enough."""

WEAKEST = 1e-3
"""Strength of the pull of learned weights to equal ones, beside a loss of about 1."""


@dataclass(frozen=True)
class Calibration:
    """What is fitted after training.

    Attributes:
        temperatures: per level, core first; softmax(logits / temperature) is how sure it is.
        weights: per level k, core first, of the log-probabilities of levels 1 to k in their consensus.
    """

    temperatures: Sequence[float]
    weights: Sequence[Sequence[float]]


def calibrate(answers: Answers) -> Calibration:
    """Fit temperatures and weights.

    Args:
        answers: of all levels, for images that they were not trained on.
    """
    levels = sorted(answers.logits)
    return Calibration(
        [fit_temperature(answers.logits[level], answers.own_target(level)) for level in levels],
        [fit_weights(answers, levels[:k]) for k in range(1, len(levels) + 1)],
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
        autocast: makes the context of a forward pass.
        parents: by level, int64 (classes,): the level's class of each class, where it tells others.
    """
    nested.eval()
    recorder = Recorder()
    levels = range(1, nested.n_levels + 1)
    models = {level: recorder.listening(level, partial(nested, level=level)) for level in levels}
    evaluate(models, recorder.watching(batches), autocast, parents)
    return calibrate(recorder.answers(parents, nested.spec.num_classes))


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature of least cross-entropy (Guo et al., "On Calibration of Modern Neural Networks", 2017,
    section 4.2).

    The cross-entropy is convex in 1 / temperature, so that its slope has one root, found by bisection.

    Args:
        logits: (N, classes). `target`: class indices (N,).

    Returns:
        Within `SHARPEST` and `SOFTEST`.
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


def fit_weights(answers: Answers, levels: Sequence[int]) -> list[float]:
    """Weights of the levels' log-probabilities in the consensus of least cross-entropy.

    A log-linear pool with one weight per level; the loss is convex in them. A slight pull to equal
    weights settles what the images leave open.

    Args:
        levels: the numbers of those that take part.
    """
    answers_of = torch.stack([answers.log_probabilities(level) for level in levels])
    even = torch.full((len(levels),), 1 / len(levels), dtype=torch.float64)
    weights = even.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def loss() -> float:
        optimizer.zero_grad()
        pooled = combined(answers_of, weights)
        value = (
            torch.nn.functional.nll_loss(pooled, answers.target) + WEAKEST * (weights - even).square().sum()
        )
        value.backward()
        return value.item()

    with torch.enable_grad():
        optimizer.step(loss)
    return [float(f"{weight:.6g}") for weight in weights.tolist()]
