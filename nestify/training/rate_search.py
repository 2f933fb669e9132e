"""`lr = "auto"`: choose the learning rate of a training by short trainings, before it begins.

Each of several rates trains a copy of the model for a few steps, with the loss, optimizer and schedule of the
training, but with the final sparsities from the first step on. The loss on held-back training images ranks
the rates, and the best of them train again for more steps (successive halving; Jamieson and Talwalkar,
"Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016, section 3).

The best rate of k steps is too high for a longer training. For T steps of stochastic gradient descent on a
convex loss, the best constant rate is proportional to T ** -0.5 (Nemirovski et al., "Robust Stochastic
Approximation Approach to Stochastic Programming", SIAM J. Optim. 2009, section 2.2). Measured on trainings
of nested levels, whose schedule lowers the rate already, that is too low, and the best rate of k steps itself
is too high for some; with T ** -0.25 all of them were within a factor of five of the best.
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from copy import deepcopy
from math import isfinite

import torch
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from nestify.data.loaders import Loader
from nestify.errors import DivergedError
from nestify.model.nested_model import NestedModel
from nestify.recipe.augment_options import AugmentOptions
from nestify.recipe.level_options import Score
from nestify.recipe.levels import Level
from nestify.recipe.options import AUTO, TrainOptions
from nestify.recipe.recipe import Recipe
from nestify.schedule.ramp import Ramp
from nestify.training.distributed import SINGLE, World
from nestify.training.loop import Batches, steps_per_epoch, train
from nestify.training.observer import Phase, RateSearch, Trial
from nestify.training.random_states import random_states, set_random_states
from nestify.training.task import LevelResult, NestedTask
from nestify.training.usual_rate import is_adaptive, usual_rate

RATES = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Learning rates of the short trainings, for SGD."""

ADAPTIVE_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01)
"""Learning rates for optimizers whose steps do not depend on the size of the gradient, such as AdamW."""

MOST_STEPS = 100
"""Maximum number of steps of all short trainings together."""

SHARE = 0.1
"""Maximum number of these steps, as a share of the steps of the training that follows."""

FINALISTS = 3
"""Number of rates that train again."""

FEWEST_STEPS = 2
"""Number of steps of a short training in the first round below which it says nothing about stability."""

EXPONENT = 0.25
"""Power of k / T by which the best rate of k steps is multiplied for a training of T steps."""

LEAST_FALL = 0.01
"""Share by which the loss must fall; a smaller fall is within the error of the measurement."""

HELD_IMAGES = 256
"""Number of training images that the short trainings do not use, and that measure their loss."""


def plan_rounds(steps: int) -> tuple[int, int]:
    """Return the steps of each short training in the first and in the second round; (0, 0) for no search.

    Args:
        steps: number of steps of the training that follows.
    """
    budget = min(MOST_STEPS, int(SHARE * steps))
    first = max(FEWEST_STEPS, budget // 2 // len(RATES))
    second = (budget - first * len(RATES)) // FINALISTS
    return (first, second) if second >= 2 * first else (0, 0)


def search_steps(steps: int) -> int:
    """Return the number of steps of all short trainings before a training of `steps` steps."""
    first, second = plan_rounds(steps)
    return first * len(RATES) + second * FINALISTS


def planned_searches(recipe: Recipe, finetune_steps: int, train_steps: int) -> dict[str, int]:
    """Return the steps of the short trainings of each search that a recipe asks for.

    Args:
        recipe: the recipe.
        finetune_steps: steps of the fine-tuning; 0 if there is none.
        train_steps: steps of the training of the levels, of one stage; 0 if there is none.
    """
    trainings = _trainings(recipe, finetune_steps, train_steps)
    return {phase: search_steps(steps) for phase, lr, steps in trainings if lr == AUTO}


def planned_rates(recipe: Recipe, finetune_steps: int, train_steps: int) -> dict[str, float]:
    """Return the learning rates that are known before a run: all for which no search takes place.

    Args:
        recipe, finetune_steps, train_steps: as for `planned_searches`.
    """
    found: dict[str, float] = {}
    for phase, lr, steps in _trainings(recipe, finetune_steps, train_steps):
        if isinstance(lr, float):
            found[phase] = lr
        elif not search_steps(steps):
            found[phase] = usual_rate(recipe.train.opt)
    return found


def _trainings(recipe: Recipe, finetune_steps: int, train_steps: int) -> list[tuple[Phase, object, int]]:
    """Return the trainings that take place, with the learning rate of the recipe and their steps."""
    trainings: list[tuple[Phase, object, int]] = [
        ("finetune", recipe.finetune.lr, finetune_steps),
        ("train", recipe.train.lr, train_steps),
    ]
    return [training for training in trainings if training[2]]


def search_rate(
    task: NestedTask,
    batches: Loader,
    options: TrainOptions,
    augment: AugmentOptions,
    *,
    steps: int,
    levels: Sequence[Level] | None = None,
    score: Score = "lamp",
    frozen: int = 0,
    world: World = SINGLE,
) -> RateSearch:
    """Choose the learning rate of a training; the model and all random states are unchanged afterwards.

    Args:
        task: the model and its loss.
        batches: the training images, in a loader that the training does not use.
        options: options of the training, except the learning rate; the result is not below its `min_lr`.
        augment: mixup and cutmix.
        steps: number of steps of the training.
        levels: levels whose weights are chosen before the first step; None leaves the entry levels unchanged.
        score: how weights are ranked when they are chosen.
        frozen: number of levels, from the core on, whose weights do not change.
        world: the processes of the run, which all take part.

    Returns:
        The chosen rate, or the default rate and the reason for it.
    """
    usual = usual_rate(options.opt)
    first, second = plan_rounds(steps)
    if not first:
        return _default(usual, f"{steps} training steps are too few to search in")
    split = _SplitBatches(batches, HELD_IMAGES // world.size)
    if not len(split):
        return _default(usual, "one batch of training images is too few to search in")

    def try_rate(lr: float, count: int) -> Trial:
        short = _options(options, lr, count, steps, steps_per_epoch(split, options.accumulate))
        ramp = None if levels is None else Ramp(levels, 0, 1, None, frozen)
        set_random_states(states, task.device)
        copy = deepcopy(task, {id(task.teacher): task.teacher})
        try:
            train(copy, split, short, augment, ramp=ramp, score=score, frozen=frozen, world=world)
            loss = _held_loss(copy, split.held, augment, world)
        except DivergedError:
            loss = float("inf")
        # Rank 0 decides, so that a difference in the last bits cannot separate the processes.
        return Trial(lr, count, world.broadcast_object(loss if isfinite(loss) else float("inf")))

    states = random_states(task.device)
    rates = ADAPTIVE_RATES if is_adaptive(options.opt) else RATES
    try:
        start = try_rate(usual, 0).loss
        trials = [try_rate(lr, first) for lr in rates]
        finalists = sorted(trials, key=lambda trial: trial.loss)[:FINALISTS]
        trials += [
            try_rate(lr, second) for lr in sorted(each.lr for each in finalists if isfinite(each.loss))
        ]
    finally:
        set_random_states(states, task.device)
    best = min(trials[len(rates) :], key=lambda trial: trial.loss, default=None)
    if best is None or not isfinite(best.loss):
        return _default(usual, "the loss was not finite after any of the short trainings", start, trials)
    if best.loss > (1 - LEAST_FALL) * start:
        problem = f"none of the short trainings lowered the loss by {LEAST_FALL:.0%} or more"
        return _default(usual, problem, start, trials)
    lr = float(f"{best.lr * (second / steps) ** EXPONENT:.2g}")
    return RateSearch(max(lr, options.min_lr), start, trials, best)


def _default(
    lr: float, problem: str, start: float = float("nan"), trials: Sequence[Trial] = ()
) -> RateSearch:
    return RateSearch(lr, start, trials, problem=problem)


def _options(options: TrainOptions, lr: float, count: int, steps: int, epoch_steps: int) -> TrainOptions:
    """Return the options of a training of `count` steps that is like the one of `steps` steps."""
    return options.model_copy(
        update={
            "lr": lr,
            # Half a step less, so that rounding up cannot add one.
            "epochs": max(0.0, count - 0.5) / epoch_steps,
            "warmup_epochs": options.warmup_epochs * count / steps,
            "min_lr": min(options.min_lr, lr),
            "ema_decay": 0.0,
        }
    )


class _SplitBatches(Batches):
    """The batches of the first epoch in two parts: the first ones are held back, the others repeat.

    Args:
        batches: the training images.
        images: number of images to hold back, at most a quarter of the batches.

    Attributes:
        held: the batches that are held back.
    """

    def __init__(self, batches: Loader, images: int) -> None:
        self._batches = batches
        self.held: list[tuple[Tensor, Tensor]] = []
        self.place = 0
        self._count = 0
        most = max(1, len(batches) // 4)
        if len(batches) < 2:
            return
        with closing(batches.epoch(0)) as epoch:
            for batch in epoch:
                self.held.append(batch)
                self._count = batches.place
                if self._count >= most or sum(len(target) for _, target in self.held) >= images:
                    break

    def __len__(self) -> int:
        return len(self._batches) - self._count if self.held else 0

    def epoch(self, number: int, first_batch: int = 0) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield the batches that are not held back; those of every epoch are the same."""
        with closing(self._batches.epoch(0, self._count + first_batch)) as epoch:
            for batch in epoch:
                self.place = self._batches.place - self._count
                yield batch


@torch.no_grad()
def _held_loss(
    task: NestedTask, held: Sequence[tuple[Tensor, Tensor]], augment: AugmentOptions, world: World
) -> float:
    """Return the joint loss of all levels on batches, over all processes.

    Batch norm uses the statistics of each batch, as in training: the running ones lag behind the weights.
    """
    nested = task.get_trainable_module()
    assert isinstance(nested, NestedModel)
    nested.train()
    task.sandwich = task.n_levels
    sums = torch.zeros(2, device=task.device)  # loss, images

    def add(loss: Tensor, result: LevelResult, _: object) -> None:
        sums[0] += loss.detach() * len(result.logits)

    for images, target in held:
        images, target = images.to(task.device), target.to(task.device)
        sums[1] += len(target)
        if isinstance(task.criterion, SoftTargetCrossEntropy):
            target = mixup_target(target, nested.spec.num_classes, smoothing=augment.smoothing)
        task.for_each_level(images, target, add)
    loss, images_seen = world.all_reduce(sums).tolist()
    return float(loss / images_seen) if images_seen else float("nan")
