"""A training in progress: its state, and how it performs one step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor

from nestify.accelerator import HostCopy
from nestify.errors import DivergedError
from nestify.model.nested_model import NestedModel
from nestify.recipe.augment_options import AugmentOptions
from nestify.recipe.level_options import Score
from nestify.recipe.metric import MAP
from nestify.recipe.options import TrainOptions
from nestify.schedule.nest import choose_weights
from nestify.schedule.ramp import Ramp
from nestify.training.checkpoint import inner, optimizer_state, restore_optimizer
from nestify.training.distributed import SINGLE, World
from nestify.training.exchange import STATISTICS, GradientExchange, read_requests
from nestify.training.frozen import FrozenLevels
from nestify.training.gradients import LevelGradients, PacedSteps
from nestify.training.health import RampWatch
from nestify.training.mixing import make_mixup
from nestify.training.precision import Precision
from nestify.training.progress import Progress, StepLog
from nestify.training.random_states import random_states, seed_random_states, set_random_states
from nestify.training.task import NestedTask


@dataclass
class Position:
    """The position of a training; checkpoints store the attributes by these names.

    Attributes:
        step: number of finished steps.
        epoch: number of finished epochs.
        batch: number of finished batches of the current epoch, including those without readable images.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0


class Stepper:
    """A training in progress, which advances step by step.

    Args:
        task: the model and its loss.
        options: optimizer, learning rate, averaging, precision.
        augment: mixup and cutmix.
        epoch_steps: number of steps per epoch.
        total: number of steps of the complete training.
        ramp: gradual sparsity; None leaves the entry levels unchanged.
        score: how weights are ranked when they are chosen again.
        frozen: number of levels, from the core on, whose weights do not change.
        world: the processes of the run, which all train the same model.

    Attributes:
        task: the model and its loss.
        nested: the model.
        total: number of steps of the complete training.
        position: number of finished steps, epochs and batches.
        should_stop: whether any process of the run was asked to stop before the last step.
        should_save: whether a checkpoint was due before the last step.
        interrupted: whether a step began and did not finish, so that the state must not be saved.
        problems: a sentence for each level whose masks stopped changing; empty until the ramp has ended.
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
        frozen: int = 0,
        world: World = SINGLE,
    ) -> None:
        nested = task.get_trainable_module()
        assert isinstance(nested, NestedModel)
        self.task, self.nested, self.total = task, nested, total
        self.position = Position()
        self.interrupted = False
        self.should_stop = self.should_save = False
        self._requests: HostCopy | None = None
        self._world = world
        self.problems: list[str] = []
        self._watch = RampWatch()
        self._clip_grad = options.clip_grad
        self._ramp, self._score = ramp, score
        self._optimizer, self._scheduler = _make_optimizer(nested, options, epoch_steps, total)
        self._scaler = Precision(task.device, options.amp, options.amp_dtype).scaler()
        self._mixup = make_mixup(augment, nested.spec.num_classes)
        if options.ema_decay:
            task.setup_ema(decay=options.ema_decay, use_warmup=True)
        world.broadcast(nested)
        self._frozen = FrozenLevels(nested, frozen)
        self._gradients = LevelGradients(nested, task.level_weights)
        PacedSteps(nested, task.level_weights, inner(self._optimizer))
        self._exchange = GradientExchange(world, nested, self._gradients.entry_levels)
        nested.train()
        self._progress = Progress(nested, task.device, task.metric)

    def step(self, batches: Sequence[tuple[Tensor, Tensor]], stop: bool = False, save: bool = False) -> None:
        """Perform one step.

        Each of several processes draws random numbers of its own, such as those of dropout and mixup. They
        are determined by seed, step and rank, so that a run that resumes draws the same ones.

        Args:
            batches: batches whose gradients are accumulated: images (B, C, H, W) and class indices (B,).
                Only in one of several processes may all be empty.
            stop: whether this process was asked to stop.
            save: whether a checkpoint is due, which rank 0 decides.
        """
        self.interrupted = True
        task, step = self.task, self.position.step
        if self._ramp is not None and self._ramp.is_due(step):
            self._choose_weights(self._ramp, step)
        self._optimizer.zero_grad(set_to_none=True)
        task.step = step
        readable = [batch for batch in batches if len(batch[1])]
        images = sum(len(target) for _, target in readable)
        self._seed(self._world.rank)
        self._exchange.start([level for level, _ in task.draw_levels()], images)
        for number, batch in enumerate(readable, start=1):
            self._accumulate(*batch, share=len(batch[1]) / images, last=number == len(readable))
        if not images:
            self._accumulate_nothing()
        asked = self._exchange.finish(stop, save)
        self._seed(self._world.size)  # the same in all processes, for optimizers that draw
        self._gradients.apply()
        self._frozen.drop_gradients()
        if self._clip_grad is not None:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self.nested.parameters(), self._clip_grad)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._frozen.restore()
        if self._scheduler is not None:
            self._scheduler.step_update(step + 1)
        task.update_ema(step=step + 1)
        self.read_requests()  # those of the last step, so that a GPU has work while the host waits for them
        self._requests = asked
        self.position.step += 1
        self.interrupted = False

    def _accumulate(self, images: Tensor, target: Tensor, share: float, last: bool) -> None:
        """Accumulate the gradients of a batch, weighted by its share of the step's images.

        With the last batch, their exchange begins.
        """
        task = self.task
        images, target = images.to(task.device, non_blocking=True), target.to(task.device, non_blocking=True)
        labels = target
        if self._mixup is not None:
            images, target = self._mixup(images, target)
        done = self._exchange.level_done if last else None
        results = task.backward(
            images, target, lambda loss: self._scaler.scale(share * loss), level_done=done
        )
        labels = labels if task.predicted is None else task.predicted
        self._progress.add([(result, task.to_level_classes(result.level, labels)) for result in results])

    def _accumulate_nothing(self) -> None:
        """Make gradients for a step without images, which get the weight 0.

        All processes must exchange the same tensors. Random images replace those that could not be read.
        """
        draw = torch.Generator().manual_seed(self.position.step)
        images = torch.randn(2, *self.nested.spec.input_size, generator=draw).to(self.task.device)
        target = torch.zeros(2, dtype=torch.long, device=self.task.device)
        if self.task.metric is MAP:
            target = torch.zeros(2, self.nested.spec.num_classes, device=self.task.device)
        if self._mixup is not None:
            images, target = self._mixup(images, target)
        statistics = [b for name, b in self.nested.named_buffers() if name.endswith(STATISTICS)]
        before = [tensor.clone() for tensor in statistics]
        self.task.backward(images, target, self._scaler.scale, level_done=self._exchange.level_done)
        for tensor, values in zip(statistics, before, strict=True):
            tensor.copy_(values)

    def _seed(self, rank: int) -> None:
        """Seed the generators of one of several processes for this step; a single process keeps its own."""
        if self._world.size > 1:
            seed_random_states(self.task.device, self.task.seed, self.position.step, rank)

    def read_requests(self) -> None:
        """Read what the processes asked for in the last step, if there are several."""
        if self._requests is not None:
            self.should_stop, self.should_save = read_requests(self._requests)

    def forget_requests(self) -> None:
        """Forget what the processes have asked for, after a checkpoint was saved."""
        self.should_save, self._requests = False, None

    def check_finite(self) -> None:
        """Check that the losses and weights are finite, so that the state is worth saving.

        Raises:
            DivergedError: if a loss or a weight is not finite.
        """
        step, total = self.position.step, self.total
        self._progress.check_finite(step, total)
        for name, parameter in self.nested.named_parameters():
            if not torch.isfinite(parameter).all():
                raise DivergedError(
                    f"{name} is not finite after step {step} of {total}; a smaller learning rate or "
                    "train.clip_grad may help"
                )

    def log(self, ended: bool) -> StepLog:
        """Return the progress of the current epoch.

        Args:
            ended: whether the epoch has ended; the means of the next epoch then start from zero.

        Raises:
            DivergedError: if a loss is not finite.
        """
        lr = self._optimizer.param_groups[0]["lr"]
        position = self.position
        return self._progress.log(position.step, self.total, position.epoch + 1, ended, lr, self._world)

    def finish(self) -> NestedModel:
        """Return the trained model, or its running average if there is one, in eval mode."""
        if self._ramp is not None and self.position.step <= self._ramp.steps:  # fewer steps than planned, too
            self._choose_weights(self._ramp, self._ramp.steps)
            if self.ema_model is not None:  # it still has the masks of the last step
                self.ema_model.set_entry_levels(self.nested.entry_levels)
        return (self.ema_model or self.nested).eval()

    def _choose_weights(self, ramp: Ramp, step: int) -> None:
        """Choose the weights of the levels again, with the ramp's sparsities at this step."""
        levels = ramp.levels_at(step)
        choose_weights(self.nested, levels, self._score, self._frozen.count)
        self._world.sync_entry_levels(self.nested)
        self._progress.update_sparsity(self.nested)
        self._watch.record(step, levels, self._progress.sparsity)
        if step >= ramp.steps:
            self.problems = self._watch.find_problems(levels)

    @property
    def ema_model(self) -> NestedModel | None:
        """The running average (EMA) of the model; None if there is none."""
        if not self.task.has_ema():
            return None
        averaged = self.task.get_trainable_module(ema=True).module
        assert isinstance(averaged, NestedModel)
        return averaged

    def state(self, world: World = SINGLE) -> dict[str, Any]:
        """Return everything that the next step depends on, except the images, for `restore`.

        Args:
            world: the processes over which the progress is summed up; all of them must call this together.
        """
        progress = self._progress.state()
        if world.size > 1:
            progress = {name: world.all_reduce(torch.as_tensor(value)) for name, value in progress.items()}
        return {
            "place": vars(self.position),
            "frozen": self._frozen.count,
            "model": dict(self.nested.state_dict()),
            "averaged": None if self.ema_model is None else dict(self.ema_model.state_dict()),
            "optimizer": optimizer_state(self._optimizer),
            "scaler": self._scaler.state_dict(),
            "watch": self._watch.last_changes,
            "problems": self.problems,
            "settled": None if self._ramp is None else self._ramp.final_sparsities(),
            "progress": progress,
            "random": random_states(self.task.device),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a training that was created with the same arguments.

        Raises:
            Exception: any exception type, if the state does not fit; the training must then not be used.
        """
        self.position = Position(**state["place"])
        self.nested.load_state_dict(state["model"])
        if self.ema_model is not None:
            self.ema_model.load_state_dict(state["averaged"])
        self._frozen = FrozenLevels(self.nested, self._frozen.count)
        restore_optimizer(self._optimizer, state["optimizer"])
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        if self._ramp is not None and state["settled"] is not None:
            self._ramp.set_sparsities(state["settled"], final=True)
        self._watch.last_changes, self.problems = state["watch"], state["problems"]
        self._progress.update_sparsity(self.nested)
        if self._world.is_main:  # the sums over all processes
            self._progress.restore(state["progress"])
        set_random_states(state["random"], self.task.device)


def _make_optimizer(
    nested: NestedModel, options: TrainOptions, epoch_steps: int, total: int
) -> tuple[torch.optim.Optimizer, Any]:
    """Create timm's optimizer and its learning-rate scheduler, which depends only on the step number."""
    assert isinstance(options.lr, float)  # the search and the default come before
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
        num_epochs=max(1, total),  # one timm epoch per step, because a run may be a fraction of an epoch
        warmup_epochs=warmup_steps,
        warmup_lr=options.lr / 100,
        min_lr=options.min_lr,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return optimizer, scheduler
