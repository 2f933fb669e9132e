"""The training loop: epochs of steps, told and kept as they go; it neither prints nor evaluates."""

from collections.abc import Callable, Generator, Sized
from contextlib import closing
from math import ceil
from typing import Protocol

from torch import Tensor

from nestify.errors import DivergedError
from nestify.model.nested_model import NestedModel
from nestify.recipe.level_options import Score
from nestify.recipe.options import AugmentOptions, TrainOptions
from nestify.schedule.ramp import Ramp
from nestify.signals import children_wait
from nestify.training.distributed import ALONE, World
from nestify.training.progress import StepLog
from nestify.training.stepper import Stepper
from nestify.training.task import NestedTask

CHECK_EVERY = 10  # steps between looks at the loss, each of which waits for the device


class Batches(Sized, Protocol):
    """Training batches, as `nestify.data.Loader` gives them; the length is that of one epoch.

    Attributes:
        place: batches of the epoch that are over, those that no image was left of too.
    """

    place: int

    def epoch(self, number: int, first_batch: int = 0) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Images (B, C, H, W) and class indices (B,) of an epoch, counted from 0."""
        ...


class Keeper:
    """Keeps a training, so that it can go on after the program ended; this one keeps nothing.

    Attributes:
        asked_to_stop: whether this process was, by a signal.
    """

    @property
    def asked_to_stop(self) -> bool:
        return False

    def resume(self, training: Stepper) -> None:
        """Put a training that is about to begin where it was when it was kept."""

    def between_steps(self, training: Stepper, *, epoch_ended: bool = False) -> None:
        """Look at a training that can be kept here: nothing was told of its last step yet, or no more
        than that it was done.

        Raises:
            DivergedError: if there is nothing worth keeping.
        """

    def failed(self, training: Stepper) -> None:
        """A training is given up because of something else, such as an image that cannot be read."""


def train(
    task: NestedTask,
    batches: Batches,
    options: TrainOptions,
    augment: AugmentOptions,
    *,
    ramp: Ramp | None = None,
    score: Score = "lamp",
    on_log: Callable[[StepLog], None] = lambda log: None,
    on_problem: Callable[[str], None] = lambda text: None,
    keeper: Keeper | None = None,
    world: World = ALONE,
) -> NestedModel:
    """Train a nested model in place.

    Args:
        task: the model and its loss.
        batches: the training images; `options.epochs` passes, the last one cut where it is a fraction.
        options: optimizer, learning rate, averaging, precision.
        augment: mixup and cutmix; what changes single images is the loader's part.
        ramp: gradual sparsity; None leaves the entry levels as they are.
        score: how weights are ranked when they are chosen again.
        on_log: told of progress, and of the end of each epoch.
        on_problem: told at the end of what went wrong with the masks.
        keeper: keeps the training, and lets it go on from where it was kept.
        world: the processes of the run.

    Returns:
        The trained model, or its running average where `options.ema_decay` asks for one; in eval mode.

    Raises:
        DivergedError: when a loss is not finite.
    """
    keeper = keeper or Keeper()
    epoch_steps = steps_per_epoch(batches, options.accumulate)
    total = total_steps(options.epochs, epoch_steps)
    training = Stepper(
        task, options, augment, epoch_steps=epoch_steps, total=total, ramp=ramp, score=score, world=world
    )
    keeper.resume(training)
    try:
        while training.place.epoch * epoch_steps < total:
            _epoch(
                training,
                batches,
                min(epoch_steps, total - training.place.epoch * epoch_steps),
                options.accumulate,
                on_log,
                keeper,
            )
    except DivergedError:
        raise
    except Exception:
        keeper.failed(training)
        raise
    trained = training.finish()
    for problem in training.problems:
        on_problem(problem)
    return trained


def steps_per_epoch(batches: Sized, accumulate: int) -> int:
    """Number of training steps, each of so many batches; what is left of an epoch is dropped."""
    return max(1, len(batches) // accumulate)


def total_steps(epochs: float, steps_per_epoch: int) -> int:
    """Number of training steps; a fraction of an epoch is rounded up."""
    return ceil(epochs * steps_per_epoch)


def _epoch(
    training: Stepper,
    batches: Batches,
    steps: int,
    accumulate: int,
    on_log: Callable[[StepLog], None],
    keeper: Keeper,
) -> None:
    """The epoch that a training is in, from where it is to the end, after `steps` of `accumulate` batches.

    A training is kept before anything is told of its last step, so that one which goes on tells of that.
    """
    place = training.place
    end = min(steps * accumulate, len(batches))
    gathered: list[tuple[Tensor, Tensor]] = []
    if place.batch < end:
        # Closed here: Python drops an interrupt that comes while it clears an abandoned generator away.
        with closing(batches.epoch(place.epoch, place.batch)) as passing:
            for batch in passing:
                keeper.between_steps(training)
                gathered.append(batch)
                if batches.place % accumulate and batches.place < end:
                    continue
                with children_wait():
                    training.take(gathered, keeper.asked_to_stop)
                    gathered.clear()
                    place.batch = batches.place
                if place.batch >= end:
                    break
                keeper.between_steps(training)
                if place.step % CHECK_EVERY == 0:
                    on_log(training.log(ended=False))
    place.batch = end
    keeper.between_steps(training, epoch_ended=True)
    on_log(training.log(ended=True))
    place.epoch += 1
    place.batch = 0
