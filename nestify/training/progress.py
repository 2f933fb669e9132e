"""What a training tells of itself: losses and accuracies on its own images, epoch by epoch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from nestify.errors import DivergedError
from nestify.model.nested_model import NestedModel
from nestify.training.distributed import World
from nestify.training.task import LevelResult


@dataclass(frozen=True)
class StepLog:
    """What the loop tells after some steps and at the end of an epoch.

    Attributes:
        step: steps done so far, of `total_steps`. `epoch`: epochs begun so far, the first is 1.
        losses: mean loss of each level since the epoch began, core first; NaN for one not sampled yet.
        top1: percent of those training images that each level classified rightly, core first.
        sparsity: what each level has at this step.
        images: training images seen so far in this epoch.
        epoch_ended: whether the epoch is over.
    """

    step: int
    total_steps: int
    epoch: int
    losses: list[float]
    top1: list[float]
    sparsity: list[float]
    lr: float
    images: int
    epoch_ended: bool


class Progress:
    """Running means of an epoch, kept on the device until somebody asks."""

    def __init__(self, nested: NestedModel, device: torch.device) -> None:
        self.sums = torch.zeros(nested.n_levels, 3, device=device)  # loss, right, images
        self.images = 0
        self.note_sparsity(nested)

    def note_sparsity(self, nested: NestedModel) -> None:
        """Count again, after the weights were chosen again."""
        self.sparsity = [nested.sparsity(k) for k in range(1, nested.n_levels + 1)]

    def add(self, results: Sequence[tuple[LevelResult, Tensor]]) -> None:
        """Count a step: what each of its levels did, with its own labels of the images, (B,)."""
        for result, labels in results:
            right = (result.logits.argmax(-1) == labels).sum()
            row = torch.stack(
                [result.loss.float() * len(labels), right.float(), right.new_tensor(len(labels))]
            )
            self.sums[result.level - 1] += row
        self.images += len(results[0][1])

    def check(self, step: int, total: int) -> None:
        """Refuse to go on with a loss that is not finite.

        Raises:
            DivergedError: naming the level.
        """
        self._check(self.sums, step, total)

    def _check(self, sums: Tensor, step: int, total: int) -> None:
        for k, (loss, _, images) in enumerate(sums.tolist(), start=1):
            if images and not isfinite(loss):
                raise DivergedError(
                    f"the loss of level {k} is {loss} at step {step} of {total}; "
                    "a smaller learning rate or train.clip_grad may help"
                )

    def log(self, step: int, total: int, epoch: int, ended: bool, lr: float, world: World) -> StepLog:
        """The means so far, over all processes; the next epoch begins with none.

        Raises:
            DivergedError: when a loss is not finite.
        """
        sums = world.summed(self.sums)
        self._check(sums, step, total)
        images = int(world.summed(torch.tensor(self.images, device=sums.device)))
        rows = sums.tolist()
        log = StepLog(
            step=step,
            total_steps=total,
            epoch=epoch,
            losses=[loss / count if count else float("nan") for loss, _, count in rows],
            top1=[100 * right / count if count else 0.0 for _, right, count in rows],
            sparsity=self.sparsity,
            lr=lr,
            images=images,
            epoch_ended=ended,
        )
        if ended:
            self.sums.zero_()
            self.images = 0
        return log

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"sums": self.sums, "images": self.images}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the sparsity is that of the model, which is to be noted first."""
        self.sums.copy_(state["sums"])
        self.images = int(state["images"])
