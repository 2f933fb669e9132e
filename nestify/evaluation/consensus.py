"""Consensus: levels predict together, by the mean of their probabilities or with fitted weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor

from nestify.data.hierarchy import coarse_target

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Predictions:
    """Predictions of levels for N images, on the CPU.

    Attributes:
        logits: by level number, core first: float32 (N, classes of the level).
        target: int64 (N,), indices of the data's own classes.
        parents: by level, int64 (classes,): the level's class of each of the data's classes; levels that
            predict the data's own classes are left out.
        classes: number of the data's own classes.
    """

    logits: Mapping[int, Tensor]
    target: Tensor
    parents: Mapping[int, Tensor]
    classes: int

    def own_target(self, level: int) -> Tensor:
        """Return the target in a level's own classes, (N,)."""
        return coarse_target(self.target, self.parents.get(level))

    def log_probabilities(self, level: int) -> Tensor:
        """Return a level's log-probabilities of the data's own classes, float64 (N, classes).

        The probability of a coarse class is divided evenly among its classes.
        """
        own = self.logits[level].double().log_softmax(-1)
        parents = self.parents.get(level)
        if parents is None:
            return own
        shared_by = torch.bincount(parents).double()
        return (own - shared_by.log())[:, parents]


class Recorder:
    """Records the predictions of networks during evaluations on the same images in the same order."""

    def __init__(self) -> None:
        self._logits: dict[int, list[Tensor]] = {}
        self._targets: list[Tensor] = []
        self._passes = 0

    def record_logits(self, level: int, network: Network) -> Network:
        """Wrap a network so that its logits are recorded as those of a level."""
        kept = self._logits.setdefault(level, [])

        def answer(images: Tensor) -> Tensor:
            logits = network(images)
            kept.append(logits.detach().float().cpu())
            return logits

        return answer

    def record_targets(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Wrap batches of images (B, C, H, W) and targets (B,); the first pass's targets are recorded."""
        self._passes += 1
        first = self._passes == 1
        for images, target in batches:
            if first:
                self._targets.append(target.cpu())
            yield images, target

    def predictions(self, parents: Mapping[int, Tensor], classes: int) -> Predictions:
        """Return everything that was recorded."""
        logits = {level: torch.cat(kept) for level, kept in sorted(self._logits.items())}
        return Predictions(logits, torch.cat(self._targets), parents, classes)


@dataclass(frozen=True)
class Consensus:
    """Accuracy of levels 1 to `level` together, over the data's own classes.

    Attributes:
        level: number of the highest of the levels.
        top1: top-1 accuracy in percent.
        top5: top-5 accuracy in percent.
        loss: mean cross-entropy.
        weights: weights of the levels' log-probabilities, core first; empty for the mean.
        dense_macs: MACs per image of all these levels; None if one is not known.
        effective_macs: the same for effective MACs.
    """

    level: int
    top1: float
    top5: float
    loss: float
    weights: Sequence[float]
    dense_macs: int | None
    effective_macs: int | None


def mean_log_probabilities(log_probabilities: Tensor) -> Tensor:
    """Return the logarithm of the mean of probabilities.

    Args:
        log_probabilities: (levels, N, classes).

    Returns:
        (N, classes)
    """
    return log_probabilities.logsumexp(0) - torch.tensor(float(len(log_probabilities))).log()


def pool_log_probabilities(log_probabilities: Tensor, weights: Tensor) -> Tensor:
    """Return the log-linear pool: the weighted sum of log-probabilities, normalised to probabilities.

    Args:
        log_probabilities: (levels, N, classes).
        weights: (levels,).

    Returns:
        (N, classes)
    """
    return torch.einsum("lnc,l->nc", log_probabilities, weights).log_softmax(-1)


def consensus(
    predictions: Predictions,
    level: int,
    weights: Sequence[float],
    macs: Sequence[tuple[int | None, int | None]],
) -> Consensus:
    """Evaluate levels 1 to `level` together.

    Args:
        predictions: predictions of at least these levels.
        level: number of the highest level.
        weights: weights of the levels' log-probabilities; empty for the mean of probabilities.
        macs: dense and effective MACs per image of every level, core first.
    """
    answer = torch.stack([predictions.log_probabilities(k) for k in range(1, level + 1)])
    pooled = (
        pool_log_probabilities(answer, torch.tensor(weights, dtype=torch.float64))
        if weights
        else mean_log_probabilities(answer)
    )
    evaluator = ClassificationEvaluator()
    evaluator.update(pooled, predictions.target)
    measured = evaluator.compute()
    dense, effective = (_sum(values[:level]) for values in zip(*macs, strict=True))
    return Consensus(
        level, measured["top1"], measured["top5"], measured["loss"], list(weights), dense, effective
    )


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
