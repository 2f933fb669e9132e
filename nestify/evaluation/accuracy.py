"""Accuracy of levels on labelled images."""

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor

from nestify.nested_model import NestedModel


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one level.

    Attributes:
        level: 1-based.
        top1, top5: percent. `loss`: mean cross-entropy.
        images: how many were evaluated.
        images_per_second: over the forward passes alone, loading aside; the first batch is not timed
            where there are others.
    """

    level: int
    top1: float
    top5: float
    loss: float
    images: int
    images_per_second: float


@torch.no_grad()
def evaluate_levels(
    nested: NestedModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    levels: Sequence[int],
    *,
    device: torch.device | None = None,
    autocast: AbstractContextManager[object] | None = None,
) -> list[Accuracy]:
    """Evaluate levels in one pass over the images.

    Args:
        nested: the model; its training mode is restored afterwards.
        batches: pairs of images (B, C, H, W) and class indices (B,).
        levels: 1-based numbers.
        device: where the model is; None asks the model.
        autocast: reduced precision, entered around each forward.
    """
    device = device or next(nested.parameters()).device
    evaluators = {level: ClassificationEvaluator(device) for level in levels}
    timers = {level: _Timer(device) for level in levels}
    was_training = nested.training
    nested.eval()
    try:
        for images, target in batches:
            images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
            for level in levels:
                with timers[level].timing(len(images)), autocast or nullcontext():
                    logits = nested(images, level=level)
                evaluators[level].update(logits, target)
    finally:
        nested.train(was_training)
    return [_summary(level, evaluators[level], timers[level]) for level in levels]


def _summary(level: int, evaluator: ClassificationEvaluator, timer: "_Timer") -> Accuracy:
    measured = evaluator.compute()
    return Accuracy(
        level=level,
        top1=measured["top1"],
        top5=measured["top5"],
        loss=measured["loss"],
        images=evaluator.num_samples,
        images_per_second=timer.images_per_second,
    )


class _Timer:
    """Seconds of forward passes; the first one is set apart, because it warms things up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.passes: list[tuple[int, float]] = []
        self._start = 0.0
        self._images = 0

    def timing(self, images: int) -> "_Timer":
        self._images = images
        return self

    def __enter__(self) -> None:
        self._synchronize()
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._synchronize()
        self.passes.append((self._images, time.perf_counter() - self._start))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def images_per_second(self) -> float:
        timed = self.passes[1:] or self.passes
        seconds = sum(duration for _, duration in timed)
        return sum(count for count, _ in timed) / seconds if seconds else 0.0
