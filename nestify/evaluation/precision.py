"""Mean average precision of levels on images that have any number of labels each."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from nestify.errors import DataError
from nestify.evaluation.accuracy import Timer
from nestify.recipe.metric import MAP, Judged, Metric


@dataclass(frozen=True)
class Precision(Judged):
    """Mean average precision of one level.

    Attributes:
        level: number of the level, from 1; 0 for the dense model.
        map: average precision in percent, averaged over the labels that some image has.
        loss: mean binary cross-entropy over images and labels.
        images: number of images.
        images_per_second: throughput of the forward passes, as in `Accuracy`.
    """

    metric: ClassVar[Metric] = MAP

    level: int
    map: float
    loss: float
    images: int
    images_per_second: float


@torch.no_grad()
def evaluate_precision(
    models: Mapping[int, Callable[[Tensor], Tensor]],
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    gather: Callable[[list[Tensor]], Sequence[list[Tensor]]] = lambda tensors: [tensors],
) -> list[Precision]:
    """Evaluate networks from images (B, C, H, W) to logits (B, labels), by level number.

    Args:
        models: the networks.
        batches: pairs of images and targets (B, labels), 1 for each label that the image has, else 0.
        autocast: returns the context of a forward pass, for reduced precision.
        gather: returns the tensors of all processes, each of which evaluates a share of the images.

    Raises:
        DataError: if no image has a label.
    """
    logits: dict[int, list[Tensor]] = {level: [] for level in models}
    timers: dict[int, Timer] = {}
    targets: list[Tensor] = []
    for images, target in batches:
        targets.append(target.cpu())
        for level, model in models.items():
            timer = timers.setdefault(level, Timer(images.device))
            with timer.timing(len(images)), autocast():
                found = model(images)
            logits[level].append(found.float().cpu())
    target = _joined(gather(targets))
    if not len(target):
        return []
    if not target.any():
        raise DataError("none of the images to evaluate on has a label, so there is no precision; use others")
    return [
        _precision(level, _joined(gather(rows)), target, timers.get(level)) for level, rows in logits.items()
    ]


def _joined(parts: Sequence[list[Tensor]]) -> Tensor:
    rows = [row for part in parts for row in part]
    return torch.cat(rows) if rows else torch.empty(0, 0)


def _precision(level: int, logits: Tensor, target: Tensor, timer: Timer | None) -> Precision:
    return Precision(
        level=level,
        map=100 * float(average_precision(logits, target).nanmean()),
        loss=float(functional.binary_cross_entropy_with_logits(logits, target.float())),
        images=len(target),
        images_per_second=timer.images_per_second if timer is not None else 0.0,
    )


def average_precision(scores: Tensor, target: Tensor) -> Tensor:
    """Return the average precision of each label: sum_k (R_k - R_{k-1}) P_k, as scikit-learn defines it.

    P_k and R_k are precision and recall of the images with the k highest scores; images with equal scores
    enter together.

    Args:
        scores: (images, labels), higher for images that are more likely to have the label.
        target: (images, labels), 1 or True if the image has the label.

    Returns:
        (labels,), float64, 0 to 1; NaN for a label that no image has.
    """
    scores, order = scores.sort(dim=0, descending=True)
    hits = target.gather(0, order).double()
    place = torch.arange(len(scores)).unsqueeze(1)
    precision = hits.cumsum(0) / (place + 1)
    ends = torch.ones_like(scores, dtype=torch.bool)
    ends[:-1] = scores[:-1] != scores[1:]
    last = place.where(ends, len(scores)).flip(0).cummin(0).values.flip(0)  # of the images with equal scores
    return (precision.gather(0, last) * hits).sum(0) / hits.sum(0)
