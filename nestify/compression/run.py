"""One run of `compress`, from a recipe to a nested file."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from timm.utils import random_seed
from torch import nn

from nestify.accelerator import pick_device
from nestify.compression.base import BaseFile
from nestify.compression.compressed import Compressed
from nestify.compression.defaults import with_fast_computing, with_ramp, with_rates, with_usual_rates
from nestify.compression.inputs import augmentation, open_inputs, round_to_stored
from nestify.compression.latency import LayerTimer
from nestify.compression.models import OWN_TEACHERS, frozen_teacher
from nestify.compression.passes import Passes
from nestify.compression.untrained import Untrained
from nestify.data.loaders import Loader, train_loader
from nestify.evaluation.agreement import compared_with_itself
from nestify.evaluation.calibration import calibrate_levels
from nestify.evaluation.measure import Score, check_finite
from nestify.files import checkpoint_path
from nestify.machine import pick_workers, workers_warning
from nestify.model.nested_model import NestedModel
from nestify.recipe.levels import Level
from nestify.recipe.recipe import Recipe
from nestify.recipe.stages import Stage, training_stages
from nestify.schedule.blocks import Removable
from nestify.schedule.budgets import NestedDesign, design_levels
from nestify.schedule.costs import Plan, PlannedLevel, count_macs, level_costs
from nestify.schedule.description import prefix_bytes
from nestify.schedule.nest import choose_weights, dense_layers
from nestify.training.distributed import SINGLE, World
from nestify.training.estimate import estimate_step
from nestify.training.frozen import copy_shared, reset_unfrozen
from nestify.training.health import check_empty, find_problems
from nestify.training.identity import run_identity
from nestify.training.loop import steps_per_epoch, total_steps
from nestify.training.observer import Observer
from nestify.training.phases import Phases
from nestify.training.precision import Precision, describe_computing
from nestify.training.rate_search import planned_rates, planned_searches
from nestify.training.resume import Checkpoints


class Run:
    """One run of `compress`: the inputs are opened on construction, the rest happens on request.

    Args:
        recipe: what to do.
        observer: notified of progress.
        world: the processes of the run.
        device: the device of this process; the recipe's by default.
        base: a file whose levels are the first levels of the recipe, and stay as they are; None without one.

    Attributes:
        checkpoints: save the run, and resume it.

    Raises:
        NestifyError: if the recipe, the checkpoint or the images are not right.
    """

    def __init__(
        self,
        recipe: Recipe,
        observer: Observer,
        world: World = SINGLE,
        device: torch.device | None = None,
        base: BaseFile | None = None,
    ) -> None:
        random_seed(recipe.seed)  # Python's and NumPy's generators too, which mixup draws from
        self.observer, self.world = observer, world
        self.device = device or pick_device(recipe.device)
        recipe = with_usual_rates(with_fast_computing(recipe, self.device))
        self.precision = Precision(self.device, recipe.train.amp, recipe.train.amp_dtype)
        self.base = base
        class_names = None if base is None or recipe.data.unlabelled else base.class_names
        self.inputs = open_inputs(recipe, observer, world.size, class_names)
        if base is not None:
            self.inputs = base.check_inputs(self.inputs, observer)
        self.recipe = recipe = self.inputs.recipe
        self.spec = self.inputs.pretrained.spec
        self.labels = self.inputs.labels
        self.frozen = 0 if base is None else base.count
        self.stages = [stage for stage in training_stages(recipe.level) if stage.frozen >= self.frozen]
        self.workers = pick_workers(recipe.data.workers, self.device, world.processors)
        if problem := workers_warning(self.workers, world.processors):
            observer.warned(problem)
        self._open_batches = partial(
            train_loader,
            preprocessing=self.spec.preprocessing,
            batch_size=self.inputs.batch_size,
            min_images=self.inputs.min_images,
            workers=self.workers,
            augment=augmentation(recipe),
            seed=recipe.seed,
            device=self.device,
            rank=world.rank,
            world_size=world.size,
        )
        self.passes = Passes(self.inputs, self.workers, self.device, self.precision, world)
        self.train_batches = self._open_batches(self.inputs.train_images)
        self._epoch_steps = steps_per_epoch(self.train_batches, recipe.train.accumulate)
        self._stage_steps = total_steps(recipe.train.epochs, self._epoch_steps)
        self.recipe = recipe = with_ramp(recipe, self._stage_steps)
        images = self.inputs.train_images
        self._class_counts = (
            images.class_counts(self.spec.num_classes) if recipe.train.class_weights else None
        )
        self._removable: Removable | None = None
        self._timer = LayerTimer(self.spec, recipe, world)
        self._images = {"training": self.inputs.train_images, "validation": self.inputs.val_images}
        network, teacher = self.inputs.pretrained.model, self.inputs.teacher
        self.checkpoints = Checkpoints(
            checkpoint_path(recipe.output_path),
            run_identity(recipe, self.device, network, teacher, self._images, self.labels, world.size)
            | ({} if base is None else base.identity()),
            recipe.train.checkpoint_minutes,
            {split: images.skipped for split, images in self._images.items()},
            world,
        )

    def plan(self, *, estimate: bool = False) -> Plan:
        """Return the costs of the levels if the weights were chosen now.

        Args:
            estimate: whether to run one small step to estimate the time and memory of training.
        """
        network = self.inputs.pretrained.model
        if estimate or self.recipe.schedule.kind != "weight" or self.base is not None:
            network = deepcopy(network)  # these change it
        design = self._nest(network.cpu())
        nested, levels, removable = design.nested, design.levels, design.removable
        choose_weights(nested, levels, self.recipe.schedule.score, self.frozen)
        count = design.solver.count
        costs = level_costs(nested, count)
        sizes = prefix_bytes(self.recipe, levels, nested, costs, self.labels, self.inputs.held_out_record)
        told = nested.classes, self.labels.class_sets(len(levels)), design.solver.latencies(nested)
        seconds = memory = None
        finetune_steps = (self.recipe.finetune.epochs or 0) * self._epoch_steps
        search_steps = planned_searches(self.recipe, finetune_steps, self._stage_steps)
        if estimate:
            everything = Stage(self.frozen, nested.n_levels)  # a step of all stages costs about as much
            task = self._phases().make_task(nested.to(self.device), None, everything)
            step_seconds, memory = estimate_step(task, self.inputs.batch_size, self.recipe.train.opt)
            plain_steps = finetune_steps + search_steps.get("finetune", 0)
            steps = self._stage_steps + search_steps.get("train", 0) + plain_steps / nested.n_levels
            seconds = step_seconds * self.recipe.train.accumulate * steps
        narrower = any(level.width < 1 for level in levels)
        shallower = any(level.depth < 1 for level in levels)
        return Plan(
            spec=self.spec,
            levels=[PlannedLevel(*row) for row in zip(levels, costs, sizes, *told, strict=True)],
            maskable=nested.entry_levels.total,
            dense_layers=dense_layers(nested, levels),
            train_images=len(self.inputs.train_images),
            val_images=len(self.inputs.val_images),
            finetune_steps=finetune_steps,
            steps=self._stage_steps * len(self.stages),
            search_steps=search_steps,
            rates=planned_rates(self.recipe, finetune_steps, self._stage_steps),
            ramp=self.recipe.schedule.ramp or 0.0,
            uncounted={**(removable.layers.uncounted if removable else {}), **count.uncounted},
            channel_groups=len(removable.channels.groups) if removable and narrower else 0,
            blocks=len(removable.ranking) if removable and shallower else 0,
            warnings=check_empty(nested),
            without_rule=sorted(removable.channels.unknown) if removable and narrower else (),
            seconds=seconds,
            memory_bytes=memory,
            computing=describe_computing(self.recipe.train, self.device),
        )

    def execute(self) -> Compressed:
        """Fine-tune, nest, train, recalibrate and evaluate; steps that the checkpoint has done are skipped.

        Raises:
            DivergedError: if a loss is not finite.
        """
        recipe, observer, checkpoints = self.recipe, self.observer, self.checkpoints
        network = self.inputs.pretrained.model.to(self.device)
        if recipe.train.channels_last:
            network = network.to(memory_format=torch.channels_last)

        # Fine-tune and evaluate the dense model, which is also the teacher if the recipe says so.
        if recipe.finetune.epochs and checkpoints.is_in_train_phase:
            checkpoints.load_dense(network)
        elif recipe.finetune.epochs:
            network = self._phases().finetune(network)
            checkpoints.save_dense(network)
        teacher = frozen_teacher(recipe, self.inputs.teacher, network)
        self._set_reference(teacher, network)
        original = checkpoints.early_results.original or self._original(network)

        # Make the nested model. Smaller levels need new batch norm statistics; a checkpoint has them.
        design = self._nest(network)
        nested, levels = design.nested, design.levels
        numbers = range(self.frozen + 1, nested.n_levels + 1)
        if recipe.train.epochs and not checkpoints.is_in_train_phase:
            self._recalibrate_levels(nested, [k for k in numbers if nested.is_smaller(k)])
        if not recipe.train.epochs:
            self._make_untrained(nested, levels)
        before = checkpoints.early_results.before
        if recipe.train.eval_before and not before:
            before = self._before(nested, levels)
        checkpoints.add_results(original=original, before=before)

        # Train the levels. Sparsities that depend on a budget are solved again when the masks are frozen.
        if recipe.train.epochs:
            nested, levels = self._train_levels(design, teacher)

        self.recipe = recipe = with_rates(recipe, checkpoints.early_results.rates)

        # Evaluate what the file will hold: rounded weights, and batch norm statistics that fit them.
        round_to_stored(nested, recipe)
        if recipe.train.bn == "recalibrate" and recipe.train.epochs:
            self._recalibrate_levels(nested, numbers)
        observer.stage("evaluating the levels")
        after = self.passes.evaluate_levels(nested, numbers)
        observer.evaluated("after", int(recipe.train.epochs), after)
        check_finite(after, "train.lr" if recipe.train.epochs else None)
        for problem in find_problems(nested, self.recipe, original, before, after):
            observer.warned(problem)

        # Fit temperatures and consensus weights, and count the costs of the finished model.
        calibration = None
        if self.inputs.held_out is not None:
            observer.stage("fitting temperatures and consensus")
            batches = self.passes.images(self.inputs.held_out)
            calibration = calibrate_levels(nested, batches, self.precision.autocast, self.labels.parents)
        for split, images in self._images.items():
            for reasons in self.world.all_gather(images.skipped):
                images.skipped.update(reasons)
            observer.skipped(split, images.skipped)
        nested = nested.cpu().to(memory_format=torch.contiguous_format).eval()
        count = count_macs(nested.network, self.spec.input_size)
        return Compressed(
            nested=nested,
            levels=levels,
            missed=replace(design.solver, count=count).check(nested, levels),
            pretrained=self.inputs.pretrained,
            costs=level_costs(nested, count),
            labels=self.labels,
            original=original,
            before=before,
            after=after,
            calibration=calibration,
        )

    def _set_reference(self, teacher: nn.Module | None, network: nn.Module) -> None:
        """Set the network that levels are compared with if there are no labels: the original one."""
        if self.recipe.data.unlabelled:
            is_own = teacher is not None and self.recipe.train.teacher in OWN_TEACHERS
            self.passes = replace(self.passes, reference=teacher if is_own else deepcopy(network).eval())

    def _train_levels(
        self, design: NestedDesign, teacher: nn.Module | None
    ) -> tuple[NestedModel, Sequence[Level]]:
        """Train the levels, stage by stage; stages that the checkpoint has done are skipped."""
        nested, levels, recipe = design.nested, design.levels, self.recipe
        original = copy_shared(nested) if len(self.stages) > 1 else {}
        for index, stage in enumerate(self.stages):
            if stage.last <= (self.checkpoints.frozen or 0):
                continue
            nested, levels = self._phases().train_levels(
                nested, levels, design.settle, teacher, self.stages, index
            )
            if stage.last < nested.n_levels:
                round_to_stored(nested, recipe)  # higher levels learn around what the file will hold
                reset_unfrozen(nested, stage.last, original)
        return nested, levels

    def _phases(self) -> Phases:
        self.checkpoints.observer = self.observer
        return Phases(
            self.recipe,
            self.spec,
            self.labels,
            self.inputs.metric,
            self.train_batches,
            self._search_batches,
            self.passes.validation,
            self.passes.evaluate_levels,
            self.device,
            self.observer,
            self.checkpoints,
            self.world,
            self._class_counts,
        )

    def _original(self, network: nn.Module) -> Score:
        """Evaluate the dense model. Without labels nothing is measured: it agrees with itself."""
        if self.inputs.metric.is_comparison:
            return compared_with_itself(self.inputs.metric, len(self.inputs.val_images))
        self.observer.stage("evaluating the original model")
        original = self.passes.evaluate_dense(network)
        self.observer.evaluated("original", 0, [original])
        check_finite([original], "finetune.lr" if self.recipe.finetune.epochs else None)
        return original

    def _nest(self, network: nn.Module) -> NestedDesign:
        if self.recipe.schedule.kind != "weight":
            self.observer.stage("finding what can be left out")
        given = None if self.base is None else self.base.sizes
        times = partial(self._timer.measure, self.observer)
        images, known, warn = self.passes.sample(combined=True), self._removable, self.observer.warned
        made = design_levels(network, self.spec, self.recipe, self.labels, images, known, given, times, warn)
        self._removable = made.removable
        if self.base is not None:
            self.base.install(made.nested)
        return made

    def _before(self, nested: NestedModel, levels: Sequence[Level]) -> list[Score]:
        """Evaluate the levels without training; a model that is to be trained is restored."""
        trains = self.recipe.train.epochs > 0
        state = deepcopy(nested.state_dict()) if trains else None
        if trains:
            self._make_untrained(nested, levels)
        self.observer.stage("evaluating the levels before training")
        before = list(self.passes.evaluate_levels(nested, range(self.frozen + 1, nested.n_levels + 1)))
        if state is not None:
            nested.load_state_dict(state)
        self.observer.evaluated("before", 0, before)
        return before

    def _make_untrained(self, nested: NestedModel, levels: Sequence[Level]) -> None:
        """Choose the weights of all levels, and make the levels as good as they can be without training."""
        batches, parents, metric = self.passes.to_recalibrate, self.labels.parents, self.inputs.metric
        Untrained(self.recipe, metric, batches, self.observer, parents, self.frozen).make(nested, levels)
        self.world.broadcast(
            nested
        )  # what is refitted depends on accuracies, which machines round differently

    def _recalibrate_levels(self, nested: NestedModel, levels: Sequence[int]) -> None:
        """Measure the private statistics of levels on training images."""
        if levels:
            self.observer.stage("recalibrating batch norm")
        for level in levels:
            self.passes.recalibrate(nested, level)

    def _search_batches(self) -> Loader:
        """Return another loader of the training images, which records nothing about them."""
        return self._open_batches(replace(self.inputs.train_images, skipped={}))
