"""Accuracy of levels on labelled images."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor

from nestify.accelerator import clock_of
from nestify.data.hierarchy import coarse_target
from nestify.recipe.metric import TOP1, Judged, Metric

NO_PARENTS: Mapping[int, Tensor] = MappingProxyType({})
"""Parents of levels that all predict the data's own classes."""


@dataclass(frozen=True)
class Accuracy(Judged):
    """Accuracy of one level.

    Attributes:
        level: number of the level, from 1; 0 for the dense model.
        top1: top-1 accuracy in percent.
        top5: top-5 accuracy in percent.
        loss: mean cross-entropy.
        images: number of images.
        images_per_second: throughput of the forward passes, without loading; the first batch is not timed
            if there are others.
    """

    metric: ClassVar[Metric] = TOP1

    level: int
    top1: float
    top5: float
    loss: float
    images: int
    images_per_second: float


@torch.no_grad()
def evaluate(
    models: Mapping[int, Callable[[Tensor], Tensor]],
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    parents: Mapping[int, Tensor] = NO_PARENTS,
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[Accuracy]:
    """Evaluate networks from images (B, C, H, W) to logits (B, classes), by level number.

    Args:
        parents: by level, int64 (classes,): the level's class of each of the data's classes; levels that
            predict the data's own classes are left out.
        total: returns the sum of a tensor over the processes that each evaluate a share of the images.
    """
    evaluators: dict[int, ClassificationEvaluator] = {}
    timers: dict[int, Timer] = {}
    for images, target in batches:
        for level, model in models.items():
            timer = timers.setdefault(level, Timer(images.device))
            with timer.timing(len(images)), autocast():
                logits = model(images)
            evaluator = evaluators.setdefault(level, ClassificationEvaluator(images.device))
            evaluator.update(logits, coarse_target(target, parents.get(level)))
    summaries = [_summary(level, evaluators.get(level), timers.get(level), total) for level in models]
    return [summary for summary in summaries if summary.images]


def _summary(
    level: int,
    evaluator: ClassificationEvaluator | None,
    timer: "Timer | None",
    total: Callable[[Tensor], Tensor],
) -> Accuracy:
    """Return the accuracy over the images of all processes; None is a process whose share had no images."""
    evaluator = evaluator or ClassificationEvaluator("cpu")
    # On the CPU, because a process without images does not know the device of the others.
    evaluator.loss_sum = total(evaluator.loss_sum.cpu().double())
    evaluator.counts = total(evaluator.counts.cpu())
    measured = evaluator.summary()
    return Accuracy(
        level=level,
        top1=measured["top1"],
        top5=measured["top5"],
        loss=measured["loss"],
        images=int(evaluator.counts[0]),
        images_per_second=timer.images_per_second if timer is not None else 0.0,
    )


class Timer:
    """Measures seconds of forward passes; the first one, which warms up, is kept apart."""

    def __init__(self, device: torch.device) -> None:
        self._clock = clock_of(device)
        self.passes: list[tuple[int, float]] = []
        self._start = 0.0
        self._images = 0

    def timing(self, images: int) -> "Timer":
        self._images = images
        return self

    def __enter__(self) -> None:
        self._start = self._clock()

    def __exit__(self, *_: object) -> None:
        self.passes.append((self._images, self._clock() - self._start))

    @property
    def images_per_second(self) -> float:
        timed = self.passes[1:] or self.passes
        seconds = sum(duration for _, duration in timed)
        return sum(count for count, _ in timed) / seconds if seconds else 0.0
