"""What every level answers for every image: what temperatures, consensus and cascades are made from."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nestify.data.hierarchy import coarse_target

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Answers:
    """Answers of levels for N images, on the CPU.

    Attributes:
        logits: by level number, core first: float32 (N, the level's classes).
        target: class indices among the data's own classes, int64 (N,).
        parents: by level, int64 (classes,): the level's class of each class, where it tells others.
        classes: how many the data has.
    """

    logits: Mapping[int, Tensor]
    target: Tensor
    parents: Mapping[int, Tensor]
    classes: int

    def own_target(self, level: int) -> Tensor:
        """The target in a level's own classes, (N,)."""
        return coarse_target(self.target, self.parents.get(level))

    def log_probabilities(self, level: int) -> Tensor:
        """A level's answer over the data's own classes, float64 (N, classes).

        A coarse class shares its probability out evenly among its classes.
        """
        own = self.logits[level].double().log_softmax(-1)
        parents = self.parents.get(level)
        if parents is None:
            return own
        shared_by = torch.bincount(parents).double()
        return (own - shared_by.log())[:, parents]


class Recorder:
    """Keeps what networks answer while they are evaluated, each on the same images in the same order."""

    def __init__(self) -> None:
        self._logits: dict[int, list[Tensor]] = {}
        self._targets: list[Tensor] = []
        self._passes = 0

    def listening(self, level: int, network: Network) -> Network:
        """The same network; its answers are kept as those of a level."""
        kept = self._logits.setdefault(level, [])

        def answer(images: Tensor) -> Tensor:
            logits = network(images)
            kept.append(logits.detach().float().cpu())
            return logits

        return answer

    def watching(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches, images (B, C, H, W) and targets (B,); the first pass's targets are kept."""
        self._passes += 1
        first = self._passes == 1
        for images, target in batches:
            if first:
                self._targets.append(target.cpu())
            yield images, target

    def answers(self, parents: Mapping[int, Tensor], classes: int) -> Answers:
        """All that was kept; see `Answers`."""
        logits = {level: torch.cat(kept) for level, kept in sorted(self._logits.items())}
        return Answers(logits, torch.cat(self._targets), parents, classes)
