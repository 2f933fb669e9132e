"""Progress of a training: mean losses and accuracies on the training images of each epoch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from nestify.errors import DivergedError
from nestify.model.nested_model import NestedModel
from nestify.recipe.metric import TOP1, Metric
from nestify.training.distributed import World
from nestify.training.task import LevelResult


@dataclass(frozen=True)
class StepLog:
    """Progress of a training, logged every few steps and at the end of an epoch.

    Attributes:
        step: number of finished steps.
        total_steps: number of all steps of the training.
        epoch: the current epoch, counted from 1.
        losses: mean loss of each level since the epoch began, core first; NaN if it was not sampled yet.
        scores: percentage of these training images that each level classified correctly, or without labels
            as the teacher does, core first; NaN if the level was not sampled yet. Empty if the metric is no
            share of the images.
        sparsity: sparsity of each level at this step, core first.
        lr: learning rate.
        images: number of training images in this epoch so far, over all processes.
        images_before: number of those before the run was resumed.
        epoch_ended: whether the epoch has ended.
        metric: what the levels are judged by.
    """

    step: int
    total_steps: int
    epoch: int
    losses: list[float]
    scores: list[float]
    sparsity: list[float]
    lr: float
    images: int
    epoch_ended: bool
    metric: Metric = TOP1
    images_before: int = 0

    @property
    def rows(self) -> dict[str, list[float]]:
        """Values of each level, core first, by the name that logs give them."""
        scores = {self.metric.key: self.scores} if self.scores else {}
        return {"loss": self.losses, **scores, "sparsity": self.sparsity}


class Progress:
    """Sums of losses and correct predictions over an epoch, kept on the device until they are logged.

    Without labels a prediction is correct if it is the teacher's.
    """

    def __init__(self, nested: NestedModel, device: torch.device, metric: Metric = TOP1) -> None:
        self._metric = metric
        self._sums = torch.zeros(nested.n_levels, 2, device=device)  # loss, correct
        self._counts = [0] * nested.n_levels  # images
        self.images = self._images_before = 0
        self.update_sparsity(nested)

    def update_sparsity(self, nested: NestedModel) -> None:
        """Compute the sparsities of the levels again, after the weights were chosen again."""
        self.sparsity = [nested.sparsity(k) for k in range(1, nested.n_levels + 1)]

    def add(self, results: Sequence[tuple[LevelResult, Tensor]]) -> None:
        """Add the results of one batch.

        Args:
            results: result of each level that ran, and the labels of the images in the level's classes, (B,);
                not used if the metric is no share of the images.
        """
        count = len(results[0][1])
        losses = torch.stack([result.loss for result, _ in results]).float() * count
        correct = torch.zeros_like(losses)
        if self._metric.counts_images:
            predicted = torch.stack([result.logits.argmax(-1) for result, _ in results])
            correct = (predicted == torch.stack([labels for _, labels in results])).sum(1).float()
        rows = torch.stack([losses, correct], 1)
        torch._foreach_add_([self._sums[result.level - 1] for result, _ in results], list(rows.unbind()))
        for result, _ in results:
            self._counts[result.level - 1] += count
        self.images += count

    def _sums_and_counts(self) -> Tensor:
        """Return the sum of losses, of correct predictions and of images of each level, (n, 3)."""
        counts = torch.tensor(self._counts, dtype=self._sums.dtype, device=self._sums.device)
        return torch.cat([self._sums, counts[:, None]], 1)

    def check_finite(self, step: int, total: int) -> None:
        """Check that the losses of this process are finite.

        Args:
            step: number of finished steps, for the message.
            total: number of all steps, for the message.

        Raises:
            DivergedError: if a loss is not finite; the message names the level.
        """
        self._check_sums(self._sums_and_counts(), step, total)

    def _check_sums(self, sums: Tensor, step: int, total: int) -> None:
        for k, (loss, _, images) in enumerate(sums.tolist(), start=1):
            if images and not isfinite(loss):
                raise DivergedError(
                    f"the loss of level {k} is {loss} at step {step} of {total}; "
                    "a smaller learning rate or train.clip_grad may help"
                )

    def log(self, step: int, total: int, epoch: int, ended: bool, lr: float, world: World) -> StepLog:
        """Return the means since the epoch began, over all processes.

        Args:
            step: number of finished steps.
            total: number of all steps.
            epoch: the current epoch, counted from 1.
            ended: whether the epoch has ended; the sums then start from zero again.
            lr: learning rate.
            world: the processes of the run.

        Raises:
            DivergedError: if a loss is not finite.
        """
        sums = world.all_reduce(self._sums_and_counts())
        self._check_sums(sums, step, total)
        images = int(world.all_reduce(torch.tensor(self.images, device=sums.device)))
        rows = sums.tolist()
        scores = [100 * correct / count if count else float("nan") for _, correct, count in rows]
        log = StepLog(
            step=step,
            total_steps=total,
            epoch=epoch,
            losses=[loss / count if count else float("nan") for loss, _, count in rows],
            scores=scores if self._metric.counts_images else [],
            sparsity=self.sparsity,
            lr=lr,
            images=images,
            epoch_ended=ended,
            metric=self._metric,
            images_before=self._images_before,
        )
        if ended:
            self._sums.zero_()
            self._counts = [0] * len(self._counts)
            self.images = self._images_before = 0
        return log

    def state(self) -> dict[str, Any]:
        """Return the state, for `restore`."""
        return {"sums": self._sums_and_counts(), "images": self.images}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state; call `update_sparsity` for the sparsities, which the state does not contain."""
        self._sums.copy_(state["sums"][:, :2])
        self._counts = [int(count) for count in state["sums"][:, 2].tolist()]
        self.images = self._images_before = int(state["images"])
