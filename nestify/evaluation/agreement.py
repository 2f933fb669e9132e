"""Agreement of levels with a reference network, on images without labels."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import isfinite, isnan
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from nestify.errors import DivergedError
from nestify.evaluation.accuracy import Accuracy, Timer
from nestify.model.nested_model import NestedModel


@dataclass(frozen=True)
class Agreement:
    """Agreement of one level with a reference network.

    Attributes:
        level: number of the level, from 1; 0 for the dense model.
        agreement: share in percent of the images for which both predict the same class.
        cosine: mean cosine similarity of the logits of both, -1 to 1.
        images: number of images.
        images_per_second: throughput of the forward passes, as in `Accuracy`.
    """

    title: ClassVar[str] = "agreement"
    key: ClassVar[str] = "agreement"
    values: ClassVar[tuple[str, ...]] = ("agreement", "cosine")

    level: int
    agreement: float
    cosine: float
    images: int
    images_per_second: float

    @property
    def score(self) -> float:
        """The agreement in percent."""
        return self.agreement


Score = Accuracy | Agreement
"""Result of an evaluation: accuracy with labels, agreement with the original model without."""


class Replay:
    """The logits of a network, computed in the first pass over some batches and repeated in later ones.

    Args:
        network: the network, from images (B, C, H, W) to logits (B, classes).

    Every pass must have the same batches, and call `watch_batches` on them.
    """

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        self._network = network
        self._logits: list[Tensor] = []
        self._next = 0

    def watch_batches(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one pass."""
        self._next = 0
        yield from batches

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of the next batch, on the device of its images."""
        if self._next == len(self._logits):
            self._logits.append(self._network(images).cpu())
        self._next += 1
        return self._logits[self._next - 1].to(images.device)


def check_finite(results: Sequence[Score], option: str) -> None:
    """Refuse networks that diverged in their last training step, which only an evaluation detects.

    Args:
        results: results of levels, or of the dense model as level 0.
        option: key of the learning rate, for the message.

    Raises:
        DivergedError: when a loss or a similarity is not finite.
    """
    for result in results:
        name, value = (
            ("loss", result.loss) if isinstance(result, Accuracy) else ("cosine similarity", result.cosine)
        )
        if not isfinite(value):
            whose = f"level {result.level}" if result.level else "the dense model"
            raise DivergedError(
                f"the {name} of {whose} on the validation images is {value}; a smaller {option} may help"
            )


def evaluate_level_agreement(
    nested: NestedModel,
    reference: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, object]],
    levels: Sequence[int],
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[Agreement]:
    """Compare levels of a nested model with a reference network in one pass over the images.

    Args:
        nested: the model; its training mode is restored afterwards.
        levels: numbers of the levels, from 1.

    The other arguments are those of `evaluate_agreement`.
    """
    was_training = nested.training
    nested.eval()
    try:
        models = {level: partial(nested, level=level) for level in levels}
        return evaluate_agreement(models, reference, batches, autocast, total)
    finally:
        nested.train(was_training)


@torch.no_grad()
def evaluate_agreement(
    models: Mapping[int, Callable[[Tensor], Tensor]],
    reference: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, object]],
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[Agreement]:
    """Compare networks, by level number, with a reference network of the same classes.

    Args:
        models: networks from images (B, C, H, W) to logits (B, classes).
        reference: the network that they are compared with; it is called once for each batch.
        batches: pairs of images and targets; the targets are not used.
        autocast: returns the context of a forward pass, for reduced precision.
        total: returns the sum of a tensor over the processes that each evaluate a share of the images.
    """
    # images, agreeing predictions, cosine similarities
    sums = {level: torch.zeros(3, dtype=torch.float64) for level in models}
    timers: dict[int, Timer] = {}
    for images, _ in batches:
        with autocast():
            expected = reference(images)
        expected = expected.float()
        for level, model in models.items():
            timer = timers.setdefault(level, Timer(images.device))
            with timer.timing(len(images)), autocast():
                logits = model(images)
            sums[level] += _compare(logits.float(), expected)
    found = [_summary(level, total(row), timers.get(level)) for level, row in sums.items()]
    return [result for result in found if result.images]


def _compare(logits: Tensor, expected: Tensor) -> Tensor:
    """Return the number of images, of agreeing predictions, and the sum of cosine similarities, (3,)."""
    same = (logits.argmax(-1) == expected.argmax(-1)).sum()
    cosine = functional.cosine_similarity(logits.double(), expected.double(), dim=-1).sum()
    return torch.stack([torch.tensor(float(len(logits))).double(), same.cpu().double(), cosine.cpu()])


def _summary(level: int, sums: Tensor, timer: Timer | None) -> Agreement:
    images, same, cosine = sums.tolist()
    return Agreement(
        level=level,
        agreement=100 * same / images if images else 0.0,
        cosine=_bounded(cosine / images) if images else 0.0,
        images=int(images),
        images_per_second=timer.images_per_second if timer is not None else 0.0,
    )


def _bounded(cosine: float) -> float:
    """Return a cosine without the rounding error that leads out of [-1, 1]; NaN remains."""
    return cosine if isnan(cosine) else min(1.0, max(-1.0, cosine))
