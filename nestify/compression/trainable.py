"""The model that `nest` makes, with the steps of a training loop."""

import os
from collections.abc import Callable, Iterable, Sequence
from math import isclose
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from nestify.compression.batches import Batch, pictures_of, readable_again
from nestify.compression.loss_function import LossFunction, checked_criterion
from nestify.compression.preflight import check_output
from nestify.compression.write import write_model
from nestify.errors import RecipeError
from nestify.files import lock_output
from nestify.model.batch_norm import recalibrate_level
from nestify.model.nested_model import NestedModel
from nestify.recipe.level_options import level_weights
from nestify.recipe.recipe import Recipe
from nestify.schedule.budgets import NestedDesign
from nestify.schedule.nest import choose_weights
from nestify.schedule.ramp import Ramp
from nestify.schedule.sensitivity import total_sensitivity
from nestify.terminal import find_caller
from nestify.training.checkpoint import inner
from nestify.training.distributed import current_world
from nestify.training.exchange import GradientExchange
from nestify.training.gradients import LevelGradients, PacedSteps, add_gradients
from nestify.training.health import check_empty
from nestify.training.joint_task import JointTask
from nestify.training.make_task import Task, make_task
from nestify.training.task import LevelResult, NestedTask, TeacherKind


class TrainableNestedModel(NestedModel):
    """A nested model with the steps of a training loop: `update`, `backward`, `recalibrate` and `save`.

    `nest` makes it. Optimizers take its `parameters()`, and `state_dict()` holds all of its state.
    """

    def __init__(
        self,
        design: NestedDesign,
        recipe: Recipe,
        ramp_steps: int,
        teacher: nn.Module | Literal["self"] | None,
    ) -> None:
        made = design.nested
        super().__init__(
            made.network,
            made.spec,
            made.level_names,
            entry=made.entry_levels,
            bn=made.bn,
            level_sizes=made.level_sizes,
        )
        self.facts = made.facts
        self._loop = _Loop(self, design, recipe, ramp_steps, teacher)

    def update(self, step: int) -> None:
        """Choose the weights of all levels again if that is due before a training step.

        Args:
            step: number of finished steps.
        """
        self._loop.update(self, step)

    def backward(
        self,
        images: Tensor,
        target: Any,
        loss_fn: LossFunction | Sequence[LossFunction] = nn.functional.cross_entropy,
        *,
        backward: Callable[[Tensor], object] = Tensor.backward,
    ) -> list[LevelResult]:
        """Run forward and backward of every level in turn, from the full level to the core level.

        Only one level's graph is in memory at a time. The gradients are added to those of earlier calls. Each
        shared weight gets the weighted mean of the gradients of the levels that use it, times a number that
        depends on how many they are, so that the learning rate of a single network fits. (With an optimizer
        such as AdamW, see `pace`.) A level's own tensors get the gradient of its own loss. In a process group
        of `torch.distributed` the gradients are averaged over the images of all processes here, so that
        neither DistributedDataParallel nor FSDP must wrap the model.

        Args:
            images: (B, C, H, W), preprocessed, on the model's device.
            target: passed to the loss function as it is.
            loss_fn: computes the loss of a level; or one function for each level, core first, for levels that
                have heads of their own. Parameters of heads get the gradient of the weighted loss.
            backward: runs a backward pass from a loss of one element, such as `fabric.backward` or
                `accelerator.backward`.

        Returns:
            The results of the levels, full level first: `level`, `loss`, `logits`, `weight`.

        Raises:
            RecipeError: if a loss function does not return one number, there are not as many as levels, or
                gradients are switched off.
        """
        return self._loop.backward(self, images, target, loss_fn, backward)

    def pace(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an adaptive optimizer take steps of a length that fits each shared weight.

        An optimizer such as AdamW divides the gradient by its size, so that it ignores the factors of
        `backward`. After this call its steps are multiplied by them. Other optimizers are left as they are.

        Args:
            optimizer: the optimizer of this model, before its first step.
        """
        self._loop.pace(self, optimizer)

    def task(self, loss_fn: LossFunction | Sequence[LossFunction] = nn.functional.cross_entropy) -> JointTask:
        """Return a training task of timm, for loops that call it and run the backward pass themselves.

        Called with images and a target, it returns a dictionary with the joint `loss` and the full level's
        logits as `output`. The graphs of all levels are in memory at the same time. It takes the place of
        `backward`, in a single process.

        Args:
            loss_fn: computes the loss of a level, as in `backward`.
        """
        return self._loop.joint_task(self, loss_fn)

    @torch.no_grad()
    def recalibrate(self, images: Iterable[Batch], levels: Sequence[int] | None = None) -> None:
        """Measure the batch-norm statistics of levels on images, at most `train.recalibrate_batches` batches.

        Args:
            images: batches of training images, preprocessed.
            levels: the levels, counted from 1; None: all.
        """
        device, channels = next(self.parameters()).device, self.spec.input_size[0]
        most = self._loop.recipe.train.recalibrate_batches
        images = readable_again(images, most)
        for level in range(1, self.n_levels + 1) if levels is None else levels:
            recalibrate_level(self, level, pictures_of(images, channels, device), most)

    def save(self, path: str | os.PathLike[str], class_names: Sequence[str] = ()) -> Path:
        """Write the nested file, which `nestify.load` and all commands read; the model is not changed.

        Args:
            path: where to write.
            class_names: names of the classes, in the order of the logits; empty if they have none.

        Returns:
            The path.

        Raises:
            RecipeError: if sparsity is still increasing, or the names are not one for each class.
            DivergedError: if a level returns values that are not finite.
            BudgetError: if a level missed its budget; the file is still written.
            OutputError: if the file cannot be written, or cannot be loaded again.
        """
        return self._loop.save(self, Path(path), class_names)

    def get_extra_state(self) -> Tensor:
        """Return the state of `update`, which becomes a part of `state_dict()`."""
        return torch.tensor(self._loop.state(), dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        self._loop.restore(state.tolist())


_PACED: WeakKeyDictionary[torch.optim.Optimizer, WeakSet[nn.Module]] = WeakKeyDictionary()
"""By optimizer: the models that `pace` was called for. Not in the loop, a copy of which would copy them."""


class _Loop:
    """State of a loop. Not a module, because its task contains the model."""

    def __init__(
        self,
        nested: TrainableNestedModel,
        design: NestedDesign,
        recipe: Recipe,
        ramp_steps: int,
        teacher: nn.Module | Literal["self"] | None,
    ) -> None:
        self.recipe, self._design = recipe, design
        self._ramp = Ramp(design.levels, ramp_steps, recipe.schedule.reselect, design.settle)
        self._step = -1
        self._is_told = False  # whether the loop says which step it is at
        # The sum of the sensitivities, by which measurements on different images differ; 0 without one.
        self._information = total_sensitivity(design.nested.facts.sensitivity.values())
        self._teacher = teacher
        self._task: NestedTask | None = None
        self._gradients: LevelGradients | None = None

    def update(self, nested: NestedModel, step: int) -> None:
        if step >= self._ramp.steps > self._step or (step != self._step and self._ramp.is_due(step)):
            choose_weights(nested, self._ramp.levels_at(step), self.recipe.schedule.score)
            current_world().sync_entry_levels(nested)
            for problem in check_empty(nested) if step >= self._ramp.steps else ():
                find_caller().warn(problem)
        self._is_told = self._step >= 0  # nest makes the first call
        self._go_to(step)

    def _go_to(self, step: int) -> None:
        self._step = step
        if self._task is not None:
            self._task.step = step

    def _count(self) -> None:
        """Go to the next step after a pass, if the loop need not say where it is, and does not."""
        if not self._is_told and not self._ramp.steps:
            self._go_to(self._step + 1)

    def backward(
        self,
        nested: NestedModel,
        images: Tensor,
        target: Any,
        loss_fn: LossFunction | Sequence[LossFunction],
        run: Callable[[Tensor], object],
    ) -> list[LevelResult]:
        if isinstance(self._task, JointTask):
            raise RecipeError(
                "this model was given to task(), whose loss has a backward pass of its own; use one"
            )
        if not torch.is_grad_enabled():
            raise RecipeError(
                "backward needs gradients, which torch.no_grad and torch.inference_mode switch off; call it "
                "outside of them"
            )
        world = current_world()
        if self._task is None:
            self._task = self._make_task(nested, images.device, NestedTask)
            world.broadcast(nested)
            self._gradients = LevelGradients(nested, self._task.level_weights)
        assert self._gradients is not None
        self._task.criterion = checked_criterion(loss_fn, nested.n_levels)
        parameters = [parameter for parameter in nested.parameters() if parameter.requires_grad]
        earlier = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        exchange = GradientExchange(world, nested, self._gradients.entry_levels)
        exchange.start([level for level, _ in self._task.draw_levels()], len(images))
        results = self._task.backward(images, target, run=run)
        exchange.finish()
        self._gradients.apply()
        add_gradients(parameters, earlier)
        self._count()
        return results

    def pace(self, nested: NestedModel, optimizer: torch.optim.Optimizer) -> None:
        found = inner(optimizer)
        models = _PACED.setdefault(found, WeakSet())
        if nested not in models:
            PacedSteps(nested, level_weights(self.recipe.level), found)
            models.add(nested)

    def joint_task(self, nested: NestedModel, loss_fn: LossFunction | Sequence[LossFunction]) -> JointTask:
        if not isinstance(self._task, JointTask):
            self._task = self._make_task(nested, next(nested.parameters()).device, JointTask)
            self._task.register_forward_hook(lambda *_: self._count())
        self._task.criterion = checked_criterion(loss_fn, nested.n_levels)
        return self._task

    def _make_task(self, nested: NestedModel, device: torch.device, kind: type[Task]) -> Task:
        frozen = self._teacher if isinstance(self._teacher, nn.Module) else None
        source: TeacherKind = "none" if self._teacher is None else "self" if frozen is None else "other"
        criterion = checked_criterion(nn.functional.cross_entropy, nested.n_levels)
        task = make_task(kind, nested, self.recipe, criterion, source, frozen, device)
        task.step = max(self._step, 0)
        return task

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what hooks into tensors, because a copy of a tensor has no hooks."""
        return self.__dict__ | {"_task": None, "_gradients": None}

    def state(self) -> list[float]:
        """Return the step of `update`, whether the sparsities are final, `_information`, and the sparsities.

        The length is always the same, because a running average (EMA) averages the state too.
        """
        ramp = self._ramp
        final = ramp.final_sparsities() is not None
        return [self._step, final, self._information, *(level.sparsity for level in ramp.levels)]

    def restore(self, state: Sequence[float]) -> None:
        step, final, information, *sparsities = state
        here, rises = self._information, step < self._ramp.steps
        if len(sparsities) != len(self._ramp.levels) or (rises and (information > 0) != (here > 0)):
            raise RecipeError(
                f"the state is not that of {len(self._ramp.levels)} levels whose weights are ranked by "
                f"{self.recipe.schedule.score}; call nest with the arguments that it was stored with"
            )
        if rises and not isclose(information, here, rel_tol=1e-5):
            find_caller().warn(
                "from here on, weights are ranked by their effect on other images, or on other weights, than "
                "before; give nest the same model and images if the levels are to be the same"
            )
        self._step = int(step)
        self._ramp.set_sparsities(sparsities, final=bool(final))

    def save(self, nested: NestedModel, path: Path, class_names: Sequence[str]) -> Path:
        if self._step < self._ramp.steps:
            raise RecipeError(
                f"sparsity increases until step {self._ramp.steps}, and update was last called with step "
                f"{self._step}; call update(step) before each step and once after the last one"
            )
        recipe = self.recipe.model_copy(update={"output": os.fspath(path)})
        check_output(recipe, "path", path)
        levels, solver = list(self._ramp.levels), self._design.solver
        with lock_output(path, find_caller().warn):
            write_model(nested, recipe, levels, solver, class_names, record=_record(recipe))
        return path


def _record(recipe: Recipe) -> dict[str, Any]:
    """Return the part of the recipe that describes the levels, for the nested file."""
    everything = recipe.to_dict()
    kept = {key: everything[key] for key in ("dtype", "seed", "model", "schedule", "level")}
    train = {key: everything["train"][key] for key in ("bn", "distill", "temperature", "sandwich")}
    return {**kept, "data": {"path": recipe.data.path}, "train": train}
