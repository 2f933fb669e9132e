"""A nested model for a training loop of the user's own: `nest`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from nestify.compression.batches import Batch, SamePictures, readable_again
from nestify.compression.latency import LayerTimer
from nestify.compression.trainable import TrainableNestedModel
from nestify.data.hierarchy import ClassLevels
from nestify.errors import RecipeError
from nestify.model.spec import ModelSpec, describe_model
from nestify.recipe.level_options import Kind, Score
from nestify.recipe.options import OWN_LOOP
from nestify.recipe.recipe import Recipe, checked_recipe
from nestify.schedule.budgets import design_levels
from nestify.terminal import find_caller
from nestify.training.distributed import current_world
from nestify.training.observer import Observer

OPTIONS = (
    "schedule",
    "level",
    "dtype",
    *(f"train.{key}" for key in ("bn", "distill", "recalibrate_batches", "sandwich", "temperature")),
)
"""Recipe keys, or sections, that `nest` takes as options."""

ARGUMENTS = {"schedule.kind": "schedule", "schedule.score": "score", "schedule.ramp": "ramp_steps"}
"""Recipe keys that are arguments of `nest`, and their names."""


def nest(
    model: nn.Module,
    levels: str | Sequence[object] | None = None,
    schedule: Kind = "weight",
    score: Score | None = None,
    *,
    options: Mapping[str, object] | None = None,
    ramp_steps: int = 0,
    teacher: nn.Module | Literal["self"] | None = None,
    images: Iterable[Batch] | None = None,
    input_size: tuple[int, int, int] | None = None,
    seed: int = 42,
) -> TrainableNestedModel:
    """Make a nested model of a timm model, to be trained in a loop of your own.

    Args:
        model: a model from `timm.create_model`, on the device that trains; used as it is, not copied. If
            levels are narrower, its channels are sorted by importance, which does not change what it returns.
            It may be a backbone, with `num_classes=0` or `features_only=True`.
        levels: the levels, core first, as in `--levels`: `"0.95,0.8,0"` or a list of such values, which are
            sparsities, widths or depths, or budgets such as `"macs=0.5"`. None: the schedule's default.
        schedule: what levels leave out: weight, channel, layer or combined.
        score: how weights are ranked; None: `fisher` if there are images, which it is measured on, and
            `lamp` otherwise.
        options: further keys of a recipe and their values: those of `[schedule]` and `level[k]`, `dtype`, and
            bn, distill, recalibrate_batches, sandwich and temperature of `[train]`.
        ramp_steps: number of training steps during which sparsity increases; `update` must then be called
            before each step.
        teacher: a frozen model whose predictions are a share `train.distill` of each level's loss, or `self`:
            the full level. None: each level learns from the loss function alone.
        images: batches of training images (B, C, H, W), preprocessed, or sequences that start with them.
            Smaller levels get their batch-norm statistics from them, and `score = "fisher"` and
            `schedule.rank = "loss"` need them; both read those of rank 0 if there are several processes.
        input_size: (channels, height, width) of the images in pixels; None: the model's default.
        seed: seed of the random choices of levels, with more than four levels or `train.sandwich`.

    Raises:
        RecipeError: if the levels, options or images are not right, or a budget cannot be met.
        UnsupportedModelError: if nestify cannot handle the model.
        DivergedError: if weights or images are not finite.
    """
    _check_model(model)
    if type(ramp_steps) is not int or ramp_steps < 0:
        raise RecipeError(f"ramp_steps = {ramp_steps!r} is not a whole number of steps, 0 or more")
    if input_size is not None and not _is_image_size(input_size):
        raise RecipeError(f"input_size = {input_size!r} is not (channels, height, width) in pixels")
    if score is None:
        score = "lamp" if images is None else "fisher"
    recipe = _recipe(model, levels, schedule, score, options, seed)
    spec = describe_model(model, input_size)
    _check_teacher(teacher, model, spec)
    _check_backbone(spec, recipe, teacher)
    if recipe.schedule.rank == "loss" and images is None:
        raise RecipeError('schedule.rank = "loss" is measured on images; give images=')
    if images is not None and recipe.schedule.kind != "weight":  # read for the design, and for batch norm
        images = readable_again(images, recipe.train.recalibrate_batches)
    world, device = current_world(), next(model.parameters()).device
    timer = partial(LayerTimer(spec, recipe, world).measure, Observer())
    was_training = model.training
    pictures = SamePictures(() if images is None else images, spec.input_size[0], world, device)
    warn = find_caller().warn
    design = design_levels(model.eval(), spec, recipe, ClassLevels(), pictures, layer_times=timer, warn=warn)
    nested = TrainableNestedModel(design, recipe, ramp_steps, teacher)
    if images is not None:
        smaller = [level for level in range(1, nested.n_levels + 1) if nested.is_smaller(level)]
        nested.recalibrate(images, smaller)
    nested.update(0)
    nested.train(was_training)
    return nested


def _recipe(
    model: nn.Module,
    levels: str | Sequence[object] | None,
    schedule: str,
    score: str,
    options: Mapping[str, object] | None,
    seed: int,
) -> Recipe:
    """Check the arguments of `nest` as a recipe."""
    options = dict(options or {})
    for key in options:
        if key in ARGUMENTS:
            raise RecipeError(f"options: {key} is an argument of nest; give {ARGUMENTS[key]}=")
        if key not in OPTIONS and re.split(r"[.\[]", key)[0] not in OPTIONS:
            raise RecipeError(
                f"options: {key} is not one of {', '.join(OPTIONS)}; the rest of the training is your loop's"
            )
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    table = {"model": {"name": architecture or type(model).__name__}, "data": {"path": OWN_LOOP}}
    if levels is not None and not isinstance(levels, str):
        levels = [each.item() if hasattr(each, "item") else each for each in levels]  # of NumPy and torch too
    given = {"levels": levels, "schedule.kind": schedule, "schedule.score": score, "seed": seed, **options}
    recipe = checked_recipe(table, "", given)
    for k, level in enumerate(recipe.level, start=1):
        if level.freeze or level.classes is not None:
            key = "freeze" if level.freeze else "classes"
            raise RecipeError(f"level[{k}].{key} needs nestify.compress; leave it out of the options of nest")
    return recipe


def _check_model(model: nn.Module) -> None:
    """Refuse a model whose levels could not be trained.

    Raises:
        RecipeError: if it is compiled already, its weights are not float32, or torch records no gradients.
    """
    if torch.is_inference_mode_enabled() or any(each.is_inference() for each in model.parameters()):
        raise RecipeError(
            "tensors that are made under torch.inference_mode cannot be trained; make the model, and call "
            "nest, outside of it"
        )
    if hasattr(model, "_orig_mod"):
        raise RecipeError(
            "the model was compiled by torch.compile; give the one that was compiled, model._orig_mod"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise RecipeError(
                f"{name} is {kind}, and levels are trained in float32; give model.float(), and call backward "
                "under torch.autocast for mixed precision"
            )


def _is_image_size(size: object) -> bool:
    return (
        isinstance(size, Sequence)
        and len(size) == 3
        and all(isinstance(side, int) and side > 0 for side in size)
    )


def _check_teacher(teacher: object, model: nn.Module, spec: ModelSpec) -> None:
    """Refuse a teacher that is none, or whose predictions the levels cannot learn from.

    Raises:
        RecipeError: if it is no module, shares weights with the model, or predicts other classes.
    """
    if teacher is None or teacher == "self":
        return
    if not isinstance(teacher, nn.Module):
        raise RecipeError(f"teacher = {teacher!r} is no model; give a torch module, 'self' or None")
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise RecipeError(
            "teacher shares weights with the model, and a teacher's weights are frozen; give a copy that was "
            "made before, copy.deepcopy(model)"
        )
    classes = getattr(teacher, "num_classes", None)
    if spec.output == "logits" and isinstance(classes, int) and classes != spec.num_classes:
        raise RecipeError(
            f"teacher predicts {classes} classes, and the model {spec.num_classes}; give a teacher that was "
            "trained on the same classes"
        )


def _check_backbone(spec: ModelSpec, recipe: Recipe, teacher: object) -> None:
    """Refuse what needs a classifier if the model is none, and what needs a backbone if it is one."""
    if spec.output == "logits":
        if recipe.schedule.keep_outputs:
            raise RecipeError(
                "schedule.keep_outputs applies to backbones; all levels of a classifier have its classes, so "
                "leave it out"
            )
    elif teacher is not None:
        raise RecipeError(
            f"teacher= compares predictions of classes, and {spec.architecture} returns {spec.returned}; "
            "leave it out, and compare with a teacher in the loss function"
        )
