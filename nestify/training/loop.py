"""The training loop: runs the steps of all epochs, logs them, and saves checkpoints through a hook."""

from collections.abc import Callable, Generator, Sized
from contextlib import closing, nullcontext
from math import ceil
from typing import Protocol

from torch import Tensor

from nestify.errors import DivergedError
from nestify.model.nested_model import NestedModel
from nestify.recipe.augment_options import AugmentOptions
from nestify.recipe.level_options import Score
from nestify.recipe.options import TrainOptions
from nestify.schedule.ramp import Ramp
from nestify.signals import defer_child_signals
from nestify.training.distributed import SINGLE, World
from nestify.training.progress import StepLog
from nestify.training.stepper import Stepper
from nestify.training.sync_norm import synced_batch_norm
from nestify.training.task import NestedTask

LOG_EVERY = 10  # steps between two logs of the loss, each of which waits for the device


class Batches(Sized, Protocol):
    """Training batches, such as those of `nestify.data.loaders.Loader`; the length is that of one epoch.

    Attributes:
        place: number of batches of the current epoch that were read, including those without readable images.
    """

    place: int

    def epoch(self, number: int, first_batch: int = 0) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield the batches of an epoch: images (B, C, H, W) and class indices (B,).

        Args:
            number: the epoch, counted from 0.
            first_batch: the batch to start with, counted from 0.
        """
        ...


class CheckpointHook:
    """Receives the calls of the training loop that save and restore checkpoints; this class does nothing."""

    @property
    def stop_requested(self) -> bool:
        """Whether a signal asked this process to stop."""
        return False

    @property
    def save_due(self) -> bool:
        """Whether a checkpoint is due."""
        return False

    def resume(self, training: Stepper) -> None:
        """Restore the state of a training that is about to start, if a checkpoint has one."""

    def between_steps(self, training: Stepper, *, epoch_ended: bool = False) -> None:
        """Handle a point between two steps, where a checkpoint may be saved.

        A run that resumes from such a point logs every epoch exactly once.

        Args:
            training: the training in progress.
            epoch_ended: whether the last step was the last one of its epoch.

        Raises:
            DivergedError: if a checkpoint is due and a loss or a weight is not finite.
        """

    def on_failure(self, training: Stepper) -> None:
        """Handle the end of the training by an exception other than DivergedError, such as a DataError."""


def train(
    task: NestedTask,
    batches: Batches,
    options: TrainOptions,
    augment: AugmentOptions,
    *,
    ramp: Ramp | None = None,
    score: Score = "lamp",
    frozen: int = 0,
    on_log: Callable[[StepLog], None] = lambda log: None,
    on_problem: Callable[[str], None] = lambda text: None,
    hook: CheckpointHook | None = None,
    world: World = SINGLE,
) -> NestedModel:
    """Train a nested model in place.

    Args:
        task: the model and its loss.
        batches: the training images; they are read for `options.epochs` epochs, which may end in a fraction.
        options: optimizer, learning rate, averaging, precision.
        augment: mixup and cutmix; the loader augments single images.
        ramp: gradual sparsity; None leaves the entry levels unchanged.
        score: how weights are ranked when they are chosen again.
        frozen: number of levels, from the core on, whose weights do not change.
        on_log: called every few steps, and at the end of each epoch.
        on_problem: called at the end for each problem with the masks.
        hook: saves and restores checkpoints; None saves none.
        world: the processes of the run.

    Returns:
        The trained model in eval mode, or its running average if `options.ema_decay` is set.

    Raises:
        DivergedError: if a loss is not finite.
    """
    hook = hook or CheckpointHook()
    epoch_steps = steps_per_epoch(batches, options.accumulate)
    total = total_steps(options.epochs, epoch_steps)
    training = Stepper(
        task,
        options,
        augment,
        epoch_steps=epoch_steps,
        total=total,
        ramp=ramp,
        score=score,
        frozen=frozen,
        world=world,
    )
    hook.resume(training)
    norms = synced_batch_norm(training.nested, world) if options.sync_batch_norm else nullcontext()
    try:
        with norms:
            _train_epochs(training, batches, options.accumulate, on_log, hook)
    except DivergedError:
        raise
    except Exception:
        hook.on_failure(training)
        raise
    trained = training.finish()
    for problem in training.problems:
        on_problem(problem)
    return trained


def steps_per_epoch(batches: Sized, accumulate: int) -> int:
    """Return the number of training steps per epoch; batches that do not fill a step are dropped.

    Args:
        batches: the batches of one epoch.
        accumulate: number of batches per step.
    """
    return max(1, len(batches) // accumulate)


def total_steps(epochs: float, steps_per_epoch: int) -> int:
    """Return the number of training steps; a fraction of a step is rounded up."""
    return ceil(epochs * steps_per_epoch)


def _train_epochs(
    training: Stepper,
    batches: Batches,
    accumulate: int,
    on_log: Callable[[StepLog], None],
    hook: CheckpointHook,
) -> None:
    """Train from the current position to the end; see `_train_epoch`."""
    epoch_steps = steps_per_epoch(batches, accumulate)
    while (first := training.position.epoch * epoch_steps) < training.total:
        _train_epoch(training, batches, min(epoch_steps, training.total - first), accumulate, on_log, hook)


def _train_epoch(
    training: Stepper,
    batches: Batches,
    steps: int,
    accumulate: int,
    on_log: Callable[[StepLog], None],
    hook: CheckpointHook,
) -> None:
    """Train from the current position to the end of the epoch.

    A checkpoint is saved before the last step is logged, so that the step is logged after resuming.

    Args:
        training: the training in progress.
        batches: the training images.
        steps: number of steps of this epoch.
        accumulate: number of batches per step.
        on_log: called every few steps, and at the end of the epoch.
        hook: saves checkpoints.
    """
    position = training.position
    end = min(steps * accumulate, len(batches))
    step_batches: list[tuple[Tensor, Tensor]] = []
    if position.batch < end:
        # `closing`, because Python discards a KeyboardInterrupt while it finalizes an abandoned generator.
        with closing(batches.epoch(position.epoch, position.batch)) as epoch_batches:
            for batch in epoch_batches:
                hook.between_steps(training)
                step_batches.append(batch)
                if batches.place % accumulate and batches.place < end:
                    continue
                with defer_child_signals():
                    training.step(step_batches, hook.stop_requested, hook.save_due)
                    step_batches.clear()
                    position.batch = batches.place
                if position.batch >= end:
                    break
                hook.between_steps(training)
                if position.step % LOG_EVERY == 0:
                    on_log(training.log(ended=False))
    position.batch = end
    hook.between_steps(training, epoch_ended=True)
    on_log(training.log(ended=True))
    position.epoch += 1
    position.batch = 0
