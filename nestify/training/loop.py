"""The training loop: steps, learning rate, gradual sparsity, averaging; it neither prints nor evaluates."""

from collections.abc import Callable, Generator, Iterator, Sized
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import Any, Protocol

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor

from nestify.errors import DivergedError
from nestify.nest import choose_weights
from nestify.nested_model import NestedModel
from nestify.recipe_schedule import Score
from nestify.recipe_sections import AugmentOptions, TrainOptions
from nestify.schedules.ramp import Ramp
from nestify.training.task import LevelResult, NestedTask

CHECK_EVERY = 10  # steps between looks at the loss, each of which waits for the device


class Batches(Sized, Protocol):
    """Training batches, as `nestify.images.Loader` gives them; the length is that of one epoch."""

    def epoch(self, number: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Images (B, C, H, W) and class indices (B,) of an epoch, counted from 0."""
        ...


@dataclass(frozen=True)
class StepLog:
    """What the loop tells after `CHECK_EVERY` steps and at the end of an epoch.

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


@dataclass(frozen=True)
class Precision:
    """Arithmetic of the forward passes: float32, or autocast with a gradient scaler where it is float16."""

    device: torch.device
    amp: bool

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 where the device computes with it, else float16; float32 when off."""
        if not self.amp or self.device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16

    def autocast(self) -> AbstractContextManager[object]:
        """A fresh context for one forward pass."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss against underflow; does nothing but in float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def train(
    task: NestedTask,
    batches: Batches,
    options: TrainOptions,
    augment: AugmentOptions,
    *,
    ramp: Ramp | None = None,
    score: Score = "lamp",
    on_log: Callable[[StepLog], None] = lambda log: None,
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

    Returns:
        The trained model, or its running average where `options.ema_decay` asks for one; in eval mode.

    Raises:
        DivergedError: when a loss is not finite.
    """
    nested = task.get_trainable_module()
    assert isinstance(nested, NestedModel)
    total = total_steps(options.epochs, len(batches))
    optimizer, scheduler = _optimizer(nested, options, len(batches), total)
    scaler = Precision(task.device, options.amp).scaler()
    mixup = _mixup(augment, nested.spec.num_classes)
    if options.ema_decay:
        task.setup_ema(decay=options.ema_decay, use_warmup=True)
    nested.train()
    progress = _Progress(nested, total, task.device)
    for step, (epoch, last, images, target) in enumerate(_steps(batches, total)):
        if ramp is not None and ramp.due(step):
            choose_weights(nested, ramp.levels_at(step), score)
            progress.note_sparsity(nested)
        images, target = images.to(task.device, non_blocking=True), target.to(task.device, non_blocking=True)
        labels = target
        if mixup is not None and len(images) % 2 == 0:
            images, target = mixup(images, target)
        optimizer.zero_grad(set_to_none=True)
        results = task.backward(images, target, scaler.scale)
        if options.clip_grad is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(nested.parameters(), options.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None:
            scheduler.step_update(step + 1)
        task.update_ema(step=step + 1)
        progress.add([(result, task.coarse(result.level, labels)) for result in results])
        if last or (step + 1) % CHECK_EVERY == 0:
            on_log(progress.log(step + 1, epoch, last, optimizer.param_groups[0]["lr"]))
    if ramp is not None and total <= ramp.steps:
        choose_weights(nested, ramp.levels_at(ramp.steps), score)
    return _trained(task, nested)


def total_steps(epochs: float, steps_per_epoch: int) -> int:
    """Number of training steps; a fraction of an epoch is rounded up."""
    return ceil(epochs * steps_per_epoch)


def _steps(batches: Batches, total: int) -> Iterator[tuple[int, bool, Tensor, Tensor]]:
    """Batches of as many epochs as it takes: (epoch from 1, last of its epoch, images, target)."""
    done, epoch = 0, 0
    while done < total:
        left = min(len(batches), total - done)
        # Closed here: Python drops an interrupt that comes while it clears an abandoned generator away.
        with closing(batches.epoch(epoch)) as passing:
            for seen, (images, target) in enumerate(islice(passing, left), start=1):
                yield epoch + 1, seen == left, images, target
        epoch += 1
        done += left


def _optimizer(
    nested: NestedModel, options: TrainOptions, steps_per_epoch: int, total: int
) -> tuple[torch.optim.Optimizer, Any]:
    """timm's optimizer and its learning-rate scheduler, which counts steps."""
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        nested,
        opt=options.opt,
        lr=options.lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        fallback_no_weight_decay=True,
    )
    warmup_steps = ceil(options.warmup_epochs * steps_per_epoch)
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


def _mixup(augment: AugmentOptions, num_classes: int) -> Callable[[Tensor, Tensor], Any] | None:
    if not (augment.mixup or augment.cutmix):
        return None
    mix: Callable[[Tensor, Tensor], Any] = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )
    return mix


def _trained(task: NestedTask, nested: NestedModel) -> NestedModel:
    if task.has_ema():
        averaged = task.get_trainable_module(ema=True).module
        assert isinstance(averaged, NestedModel)
        nested = averaged
    return nested.eval()


class _Progress:
    """Running means of an epoch, kept on the device until somebody asks."""

    def __init__(self, nested: NestedModel, total: int, device: torch.device) -> None:
        self.total = total
        self.sums = torch.zeros(nested.n_levels, 3, device=device)  # loss, right, images
        self.images = 0
        self.note_sparsity(nested)

    def note_sparsity(self, nested: NestedModel) -> None:
        """Count again, after the weights were chosen again."""
        self.sparsity = [nested.sparsity(k) for k in range(1, nested.n_levels + 1)]

    def add(self, results: list[tuple[LevelResult, Tensor]]) -> None:
        for result, labels in results:
            right = (result.logits.argmax(-1) == labels).sum()
            row = torch.stack(
                [result.loss.float() * len(labels), right.float(), right.new_tensor(len(labels))]
            )
            self.sums[result.level - 1] += row
        self.images += len(results[0][1])

    def log(self, step: int, epoch: int, ended: bool, lr: float) -> StepLog:
        rows = self.sums.tolist()
        losses = [loss / count if count else float("nan") for loss, _, count in rows]
        for k, (loss, (_, _, count)) in enumerate(zip(losses, rows, strict=True), start=1):
            if count and not torch.isfinite(torch.tensor(loss)):
                raise DivergedError(
                    f"the loss of level {k} is {loss} at step {step} of {self.total}; "
                    "a smaller learning rate or train.clip_grad may help"
                )
        log = StepLog(
            step=step,
            total_steps=self.total,
            epoch=epoch,
            losses=losses,
            top1=[100 * right / count if count else 0.0 for _, right, count in rows],
            sparsity=self.sparsity,
            lr=lr,
            images=self.images,
            epoch_ended=ended,
        )
        if ended:
            self.sums.zero_()
            self.images = 0
        return log
