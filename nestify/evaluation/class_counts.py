"""What is counted while levels are evaluated: correct predictions by class, and the progress."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nestify.data.hierarchy import coarse_target
from nestify.evaluation.consensus import Network
from nestify.terminal import Progress


@dataclass(frozen=True)
class ClassCounts:
    """How many images of each class a level predicted correctly.

    Attributes:
        images: number of images of each class of the level, by index.
        correct: number of these whose class was predicted.
    """

    images: tuple[int, ...]
    correct: tuple[int, ...]


class ClassCounter:
    """Counts the correct predictions of one level, by class.

    Args:
        classes: number of classes that the level predicts.
        parents: int64 (classes of the data,): the level's class of each; None if they are the same.
    """

    def __init__(self, classes: int, parents: Tensor | None) -> None:
        self._classes = classes
        self._parents = parents
        self._images = torch.zeros(classes, dtype=torch.int64)
        self._correct = torch.zeros(classes, dtype=torch.int64)
        self._logits = torch.empty(0, classes)

    def watch_network(self, network: Network) -> Network:
        """Return the network with its logits remembered; it is called once for each watched batch."""

        def predict(images: Tensor) -> Tensor:
            self._logits = network(images)
            return self._logits

        return predict

    def watch_batches(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of images (B, C, H, W) and classes of the data (B,).

        A batch is counted when the next one is requested, so that the counting is not timed with the network.
        """
        for images, target in batches:
            yield images, target
            wanted = coarse_target(target, self._parents)
            right = wanted[self._logits.argmax(-1) == wanted]
            self._images += torch.bincount(wanted, minlength=self._classes).cpu()
            self._correct += torch.bincount(right, minlength=self._classes).cpu()

    def counts(self) -> ClassCounts:
        """Return the counts of all batches so far."""
        return ClassCounts(tuple(self._images.tolist()), tuple(self._correct.tolist()))


class Passes:
    """Reports the progress of several passes over the images.

    Args:
        total: number of images of all passes; 0 if it is not known.
        advance: called with the number of evaluated images and the total.
    """

    def __init__(self, total: int, advance: Progress) -> None:
        self._total = total
        self._advance = advance
        self._done = 0

    def watch_batches(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches, and report each one when the next is requested."""
        for images, target in batches:
            yield images, target
            self._done += len(target)
            self._advance(self._done, self._total)
