"""A training in progress: what its next step depends on, and the step itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor

from nestify.errors import DivergedError
from nestify.model.nested_model import NestedModel
from nestify.recipe.level_options import Score
from nestify.recipe.options import AugmentOptions, TrainOptions
from nestify.schedule.nest import choose_weights
from nestify.schedule.ramp import Ramp
from nestify.training.checkpoint import optimizer_state, random_states, restore_optimizer, set_random_states
from nestify.training.distributed import ALONE, World
from nestify.training.health import RampWatch
from nestify.training.precision import Precision
from nestify.training.progress import Progress, StepLog
from nestify.training.task import NestedTask


class LevelGradients:
    """Scales the gradients of a nested model by what the levels that use each weight need.

    Args:
        level_weights: a_k by level, core first; a level of weight 0 is not trained and does not count.
    """

    def __init__(self, nested: NestedModel, level_weights: Sequence[float]) -> None:
        self._nested = nested
        above = [[a for a in level_weights[level:] if a] for level in range(nested.n_levels)]
        factors = [sqrt(len(users)) / sum(users) if users else 1.0 for users in above]
        device = next(nested.parameters()).device
        # entry levels count from 1; n + 1 is no level's
        self._factors = torch.tensor([1.0, *factors, 1.0], device=device)
        shared = {
            name: tensor for name, tensor in nested.shared_tensors().items() if name not in nested.own_names
        }
        level_sizes = nested.level_sizes
        fixed = {} if level_sizes is None else level_sizes.entry_levels(shared)
        self._fixed = {name: entry.to(device) for name, entry in fixed.items()}

    def apply(self) -> None:
        """Scale the gradients that all levels have added to."""
        for name, entry in (self._fixed | dict(self._nested.entry.items())).items():
            gradient = self._nested.shared_tensor(name).grad
            if gradient is not None:
                factors = self._factors.to(gradient.dtype)
                # four times as fast as factors[entry.int()]
                gradient.mul_(factors.index_select(0, entry.flatten().int()).view(entry.shape))


@dataclass
class Place:
    """Where a training is.

    Attributes:
        step: steps done.
        epoch: epochs that are over.
        batch: batches of the epoch in progress that are over, those that no image was left of too.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0


class Stepper:
    """A training in progress.

    Args:
        task: the model and its loss.
        options: optimizer, learning rate, averaging, precision.
        augment: mixup and cutmix.
        epoch_steps: steps of an epoch. `total`: of the whole training.
        ramp: gradual sparsity; None leaves the entry levels as they are.
        score: how weights are ranked when they are chosen again.
        world: the processes of the run, which all train the same model.

    Attributes:
        stopping: whether a process of the run was asked to stop.
        place: where it is. `torn`: whether a step was begun and not ended, so that it cannot go on.
        problems: a sentence for each level whose masks stand still; empty until the ramp has ended.
    """

    def __init__(
        self,
        task: NestedTask,
        options: TrainOptions,
        augment: AugmentOptions,
        *,
        epoch_steps: int,
        total: int,
        ramp: Ramp | None,
        score: Score,
        world: World = ALONE,
    ) -> None:
        nested = task.get_trainable_module()
        assert isinstance(nested, NestedModel)
        self.task, self.nested, self.total = task, nested, total
        self.place = Place()
        self.torn = False
        self.stopping = False
        self._world = world
        self.problems: list[str] = []
        self._watch = RampWatch()
        self._clip_grad = options.clip_grad
        self._ramp, self._score = ramp, score
        self._optimizer, self._scheduler = _optimizer(nested, options, epoch_steps, total)
        self._scaler = Precision(task.device, options.amp, options.amp_dtype).scaler()
        self._mixup = _mixup(augment, nested.spec.num_classes)
        if options.ema_decay:
            task.setup_ema(decay=options.ema_decay, use_warmup=True)
        world.copy_first(nested)
        self._gradients = LevelGradients(nested, task.level_weights)
        nested.train()
        self._progress = Progress(nested, task.device)

    def take(self, batches: Sequence[tuple[Tensor, Tensor]], stop: bool = False) -> None:
        """Do one step.

        Args:
            batches: whose gradients are added up: images (B, C, H, W) and class indices (B,).
            stop: whether this process was asked to stop.
        """
        self.torn = True
        task, step = self.task, self.place.step
        if self._ramp is not None and self._ramp.is_due(step):
            self._choose(self._ramp, step)
        self._optimizer.zero_grad(set_to_none=True)
        task.step = step
        images = sum(len(target) for _, target in batches)
        for batch in batches:
            self._add(*batch, share=len(batch[1]) / images)
        self.stopping = self._world.average(self.nested, images, stop)
        self._gradients.apply()
        if self._clip_grad is not None:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self.nested.parameters(), self._clip_grad)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._scheduler is not None:
            self._scheduler.step_update(step + 1)
        task.update_ema(step=step + 1)
        self.place.step += 1
        self.torn = False

    def _add(self, images: Tensor, target: Tensor, share: float) -> None:
        """Add the gradients of a batch, which is so much of the step."""
        task = self.task
        images, target = images.to(task.device, non_blocking=True), target.to(task.device, non_blocking=True)
        labels = target
        if self._mixup is not None:
            images, target = self._mixup(images, target)
        results = task.backward(images, target, lambda loss: self._scaler.scale(share * loss))
        self._progress.add([(result, task.coarse(result.level, labels)) for result in results])

    def check(self) -> None:
        """Refuse to go on from here where the run is lost.

        Raises:
            DivergedError: if a loss or a weight is not finite.
        """
        step, total = self.place.step, self.total
        self._progress.check(step, total)
        for name, parameter in self.nested.named_parameters():
            if not torch.isfinite(parameter).all():
                raise DivergedError(
                    f"{name} is not finite after step {step} of {total}; a smaller learning rate or "
                    "train.clip_grad may help"
                )

    def log(self, ended: bool) -> StepLog:
        """How it goes; the next epoch begins with new means where this one has `ended`."""
        lr = self._optimizer.param_groups[0]["lr"]
        return self._progress.log(self.place.step, self.total, self.place.epoch + 1, ended, lr, self._world)

    def finish(self) -> NestedModel:
        """The trained model, or its running average; in eval mode."""
        if self._ramp is not None and self.total <= self._ramp.steps:
            self._choose(self._ramp, self._ramp.steps)
            if self.averaged is not None:  # which saw the masks of the last step
                self.averaged.set_entry_levels(self.nested.entry_levels)
        return (self.averaged or self.nested).eval()

    def _choose(self, ramp: Ramp, step: int) -> None:
        """Choose the weights again, as the ramp has it at this step."""
        levels = ramp.levels_at(step)
        choose_weights(self.nested, levels, self._score)
        self._world.agree(self.nested)
        self._progress.note_sparsity(self.nested)
        self._watch.note(step, levels, self._progress.sparsity)
        if step >= ramp.steps:
            self.problems = self._watch.problems(levels)

    @property
    def averaged(self) -> NestedModel | None:
        """The running average of the model; None where there is none."""
        if not self.task.has_ema():
            return None
        averaged = self.task.get_trainable_module(ema=True).module
        assert isinstance(averaged, NestedModel)
        return averaged

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the images; for `restore`."""
        return {
            "place": vars(self.place),
            "model": dict(self.nested.state_dict()),
            "averaged": None if self.averaged is None else dict(self.averaged.state_dict()),
            "optimizer": optimizer_state(self._optimizer),
            "scaler": self._scaler.state_dict(),
            "watch": self._watch.seen,
            "problems": self.problems,
            "settled": None if self._ramp is None else self._ramp.final_sparsities(),
            "progress": self._progress.state(),
            "random": random_states(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of another one, of the same arguments.

        Raises:
            Exception: for a state that does not fit; the model is then spoilt.
        """
        self.place = Place(**state["place"])
        self.nested.load_state_dict(state["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        restore_optimizer(self._optimizer, state["optimizer"])
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        if self._ramp is not None and state["settled"] is not None:
            self._ramp.set_final_sparsities(state["settled"])
        self._watch.seen, self.problems = state["watch"], state["problems"]
        self._progress.note_sparsity(self.nested)
        self._progress.restore(state["progress"])
        set_random_states(state["random"])


def _optimizer(
    nested: NestedModel, options: TrainOptions, epoch_steps: int, total: int
) -> tuple[torch.optim.Optimizer, Any]:
    """timm's optimizer and its learning-rate scheduler, which counts steps and remembers nothing."""
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        nested,
        opt=options.opt,
        lr=options.lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        fallback_no_weight_decay=True,
    )
    warmup_steps = ceil(options.warmup_epochs * epoch_steps)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=options.sched,
        num_epochs=max(1, total),  # one timm epoch per step: a fraction of an epoch is a whole run here
        warmup_epochs=warmup_steps,
        warmup_lr=options.lr / 100,
        min_lr=options.min_lr,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return optimizer, scheduler


def _mixup(
    augment: AugmentOptions, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixes images (B, C, H, W) and class indices (B,) to images and soft targets (B, classes)."""
    if not (augment.mixup or augment.cutmix):
        return None
    mix: Callable[[Tensor, Tensor], Any] = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )

    def mixed(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) % 2:  # timm mixes pairs; the targets must be soft all the same
            return images, mixup_target(target, num_classes, smoothing=augment.smoothing)
        both: tuple[Tensor, Tensor] = mix(images, target)
        return both

    return mixed
