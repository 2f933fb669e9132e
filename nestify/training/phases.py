"""The two trainings of a run: the dense model is fine-tuned, then its levels are trained."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nestify.data.hierarchy import ClassLevels
from nestify.data.loaders import Loader
from nestify.evaluation.measure import Score
from nestify.model.nested_model import NestedModel
from nestify.model.pretrained import save_plain
from nestify.model.spec import ModelSpec
from nestify.recipe.levels import Level
from nestify.recipe.metric import MAP, Metric
from nestify.recipe.options import AUTO, TEACHERS, TrainOptions
from nestify.recipe.recipe import Recipe
from nestify.recipe.stages import Stage
from nestify.schedule.ramp import Ramp
from nestify.training.distributed import World
from nestify.training.loop import steps_per_epoch, total_steps, train
from nestify.training.losses import label_loss, multi_label_loss
from nestify.training.make_task import make_task
from nestify.training.observer import Observer, Phase
from nestify.training.precision import Precision
from nestify.training.progress import StepLog
from nestify.training.rate_search import search_rate
from nestify.training.resume import Checkpoints
from nestify.training.task import NestedTask, Teacher


@dataclass(frozen=True)
class Phases:
    """The two trainings of a run, and the objects that they share.

    Args:
        recipe: the recipe of the run.
        spec: specification of the model that is trained.
        labels: the classes that its levels predict.
        metric: what they are judged by.
        batches: the training images.
        search_batches: returns another loader of the training images, for a search.
        val_batches: returns a loader of the validation images.
        evaluate: evaluates levels of a nested model, by their numbers, on batches of such images.
        device: the device of this process.
        observer: notified of every step, and of evaluations during the training.
        checkpoints: saves the trainings, and resumes them.
        world: the processes of the run.
        class_counts: number of training images of each class; None if the classes have no weights.
    """

    recipe: Recipe
    spec: ModelSpec
    labels: ClassLevels
    metric: Metric
    batches: Loader
    search_batches: Callable[[], Loader]
    val_batches: Callable[[], Loader]
    evaluate: Callable[[NestedModel, Sequence[int], Iterable[tuple[Tensor, Tensor]]], Sequence[Score]]
    device: torch.device
    observer: Observer
    checkpoints: Checkpoints
    world: World
    class_counts: Sequence[int] | None = None

    def finetune(self, network: nn.Module) -> nn.Module:
        """Fine-tune the dense model, as a nested model of one level, and return its network."""
        recipe = self.recipe
        self.observer.stage("fine-tuning the dense model")
        dense = NestedModel(network, self.spec, ["full"], masked=())
        epochs = float(recipe.finetune.epochs or 0)
        options = recipe.train.model_copy(update={"epochs": epochs, "warmup_epochs": 0.0})
        task = NestedTask(
            dense,
            self._criterion(),
            weights=[1.0],
            distill=[0.0],
            teacher=Teacher("none"),
            seed=recipe.seed,
            recompute=recipe.train.grad_checkpointing,
            autocast=self._precision.autocast,
            device=self.device,
            metric=self.metric,
        )
        options = self._with_rate("finetune", recipe.finetune.lr, options, lambda: task)
        on_log = partial(self.observer.stepped, "finetune")
        with self.checkpoints.running("finetune") as hook:
            trained = train(
                task, self.batches, options, recipe.augment, on_log=on_log, hook=hook, world=self.world
            )
        self._report_left_out()
        if recipe.finetune.save is not None and self.world.is_main:
            save_plain(trained.network, Path(recipe.finetune.save))
        return trained.network

    def train_levels(
        self,
        nested: NestedModel,
        levels: Sequence[Level],
        settle: Callable[[], Sequence[Level]] | None,
        teacher: nn.Module | None,
        stages: Sequence[Stage],
        index: int,
    ) -> tuple[NestedModel, Sequence[Level]]:
        """Train the levels of a stage together.

        Args:
            nested: the model to train.
            levels: its levels, core first, with the budgets solved.
            settle: solves the budgets again when the masks are frozen; None if that is not needed.
            teacher: the frozen teacher network; None if there is none.
            stages: the stages of the run, which all take the same number of steps; the logs count through.
            index: the stage to train, counted from 0.

        Returns:
            The trained model, and its levels with their final sparsities.
        """
        recipe, stage = self.recipe, stages[index]
        numbers = range(stage.frozen + 1, stage.last + 1)
        names = ", ".join(nested.level_names[k - 1] for k in numbers)
        self.observer.stage(
            "training the levels" if len(numbers) == nested.n_levels else f"training levels: {names}"
        )
        steps = total_steps(recipe.train.epochs, steps_per_epoch(self.batches, recipe.train.accumulate))
        ramp_steps = round((recipe.schedule.ramp or 0.0) * steps)
        ramp = Ramp(levels, ramp_steps, recipe.schedule.reselect, settle, stage.frozen)
        options = self._with_rate(
            "train",
            recipe.train.lr,
            recipe.train,
            lambda: self.make_task(nested, teacher, stage),
            levels=levels,
            score=recipe.schedule.score,
            frozen=stage.frozen,
        )
        task = self.make_task(nested, teacher, stage, compiled=True)

        def on_log(log: StepLog) -> None:
            log = replace(
                log,
                step=index * steps + log.step,
                total_steps=len(stages) * steps,
                epoch=index * ceil(recipe.train.epochs) + log.epoch,
            )
            self.observer.stepped("train", log)
            if log.epoch_ended and log.epoch % recipe.train.eval_every == 0 and log.step < log.total_steps:
                model = task.get_trainable_module(ema=True).module if task.has_ema() else nested
                images = self.checkpoints.interruptible(self.val_batches())
                self.observer.evaluated("epoch", log.epoch, self.evaluate(model, numbers, images))

        earlier, later = index * steps, (len(stages) - index - 1) * steps
        with self.checkpoints.running("train", earlier, later) as hook:
            trained = train(
                task,
                self.batches,
                options,
                recipe.augment,
                ramp=ramp,
                score=recipe.schedule.score,
                frozen=stage.frozen,
                on_log=on_log,
                on_problem=self.observer.warned,
                hook=hook,
                world=self.world,
            )
        self._report_left_out()
        if task.compiled is not None:
            graphs = task.compiled.count_graphs()
            self.observer.stage(f"torch.compile made {graphs} programs for {nested.n_levels} levels")
        return trained, ramp.levels

    def _with_rate(
        self,
        phase: Phase,
        lr: float | Literal["auto"] | None,
        options: TrainOptions,
        make_task: Callable[[], NestedTask],
        **search: Any,
    ) -> TrainOptions:
        """Return the options of a training with its learning rate, which is searched for if it is "auto".

        Args:
            phase: the training.
            lr: the learning rate of the recipe, whose default is known by now.
            options: the other options.
            make_task: returns the task to search with.
            search: further arguments of `search_rate`.
        """
        rates = self.checkpoints.early_results.rates
        if lr == AUTO and phase not in rates:
            self.observer.stage(f"searching for the learning rate ({phase}.lr = auto)")
            batches = self.search_batches()
            steps = total_steps(options.epochs, steps_per_epoch(batches, options.accumulate))
            found = search_rate(
                make_task(), batches, options, self.recipe.augment, steps=steps, world=self.world, **search
            )
            self.observer.searched(phase, found)
            if found.problem:
                self.observer.warned(
                    f"{phase}.lr = auto: {found.problem}, so the learning rate is {found.lr:g}, the default; "
                    "give a number to use another"
                )
            rates = {**rates, phase: found.lr}
            self.checkpoints.add_results(rates=rates)
        return options.model_copy(update={"lr": rates[phase] if lr == AUTO else lr})

    def make_task(
        self, nested: NestedModel, frozen: nn.Module | None, stage: Stage, *, compiled: bool = False
    ) -> NestedTask:
        """Return the training task: the joint loss of the levels of a stage.

        Args:
            nested: the model to train.
            frozen: the frozen teacher network; None uses a copy of the model, if a teacher is needed.
            stage: the levels to train; the others have weight 0.
            compiled: whether torch may compile the levels, if the recipe enables it.
        """
        options = self.recipe.train
        kind: Any = options.teacher if options.teacher in TEACHERS else "other"
        if frozen is None and (kind in ("original", "both", "other") or self.metric.is_comparison):
            frozen = deepcopy(nested.network)  # for an estimate: a teacher with the same cost
        return make_task(
            NestedTask,
            nested,
            self.recipe,
            self._criterion(),
            kind,
            frozen,
            self.device,
            trained=range(stage.frozen + 1, stage.last + 1),
            metric=self.metric,
            parents=self.labels.parents,
            compiled=options.compile and compiled,
            recompute=options.grad_checkpointing,
            autocast=self._precision.autocast,
        )

    def _report_left_out(self) -> None:
        """Warn about the training batches that had too few readable images, and count from 0 again."""
        if self.batches.left_out:
            self.observer.warned(
                f"{self.batches.left_out} training batches had a single readable image, which batch norm "
                "cannot use, and were left out"
            )
        self.batches.left_out = 0

    @property
    def _precision(self) -> Precision:
        return Precision(self.device, self.recipe.train.amp, self.recipe.train.amp_dtype)

    def _criterion(self) -> nn.Module:
        train, augment, counts = self.recipe.train, self.recipe.augment, self.class_counts
        if self.metric is MAP:
            loss = multi_label_loss(train, augment, counts, len(self.batches.images))
        else:
            loss = label_loss(train, augment, counts)
        return loss.to(self.device)
