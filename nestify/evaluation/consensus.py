"""Several levels answer together: their mean, or a combination that was learned."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor

from nestify.evaluation.answers import Answers


@dataclass(frozen=True)
class Consensus:
    """Accuracy of levels 1 to `level` together, over the data's own classes.

    Attributes:
        top1, top5: percent. `loss`: mean cross-entropy.
        weights: of each level's log-probabilities, core first; empty for the mean.
        dense_macs, effective_macs: per image, of all these levels; None if one is not known.
    """

    level: int
    top1: float
    top5: float
    loss: float
    weights: Sequence[float]
    dense_macs: int | None
    effective_macs: int | None


def mean_answer(log_probabilities: Tensor) -> Tensor:
    """Logarithm of the mean of probabilities.

    Args:
        log_probabilities: (levels, N, classes).

    Returns:
        (N, classes)
    """
    return log_probabilities.logsumexp(0) - torch.tensor(float(len(log_probabilities))).log()


def combined(log_probabilities: Tensor, weights: Tensor) -> Tensor:
    """Log-linear pool: log-probabilities, weighted, added up, and scaled to probabilities again.

    Args:
        log_probabilities: (levels, N, classes). `weights`: (levels,).

    Returns:
        (N, classes)
    """
    return torch.einsum("lnc,l->nc", log_probabilities, weights).log_softmax(-1)


def consensus(
    answers: Answers,
    level: int,
    weights: Sequence[float],
    macs: Sequence[tuple[int | None, int | None]],
) -> Consensus:
    """Accuracy of levels 1 to `level` together.

    Args:
        weights: of each level's log-probabilities; empty: the mean of probabilities.
        macs: of every level, core first: per image, dense and effective.
    """
    answer = torch.stack([answers.log_probabilities(k) for k in range(1, level + 1)])
    pooled = combined(answer, torch.tensor(weights, dtype=torch.float64)) if weights else mean_answer(answer)
    evaluator = ClassificationEvaluator()
    evaluator.update(pooled, answers.target)
    measured = evaluator.compute()
    dense, effective = (_sum(values[:level]) for values in zip(*macs, strict=True))
    return Consensus(
        level, measured["top1"], measured["top5"], measured["loss"], list(weights), dense, effective
    )


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
