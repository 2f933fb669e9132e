"""Opening the inputs of a recipe: images, model, teacher, optimizer."""

from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from nestify.data.dataset import Images, open_splits
from nestify.data.hierarchy import ClassLevels, read_class_levels
from nestify.errors import CheckpointError, RecipeError
from nestify.model.pretrained import PretrainedModel, load_pretrained
from nestify.model.spec import ModelSpec
from nestify.recipe.options import TEACHERS
from nestify.recipe.recipe import Recipe
from nestify.training.observer import Observer

USUAL_OPTIMIZERS = ("sgd", "adamw", "lamb")


@dataclass(frozen=True)
class Inputs:
    """The opened inputs of a recipe.

    Attributes:
        train_images: images to train on, without those held out.
        val_images: images to evaluate on.
        held_out: training images that are set aside to fit temperatures and consensus weights; None if the
            recipe asks for none.
        pretrained: the model, with as many classes as the images.
        teacher: a timm model that teaches, in eval mode; None if the run needs none.
        labels: classes that each level predicts.
    """

    train_images: Images
    val_images: Images
    held_out: Images | None
    pretrained: PretrainedModel
    teacher: nn.Module | None
    labels: ClassLevels


def open_inputs(recipe: Recipe, observer: Observer, processes: int) -> Inputs:
    """Open the images, the model and the teacher of a recipe, and check that they fit each other.

    Args:
        recipe: what to open.
        observer: notified of each stage.
        processes: number of processes that share the run.

    Raises:
        NestifyError: if the recipe, the checkpoint or the images are not right.
    """
    check_optimizer(recipe)
    observer.stage("opening images")
    train_images, val_images = open_recipe_images(recipe)
    held_out = None
    if recipe.data.calibrate is not None:
        train_images, held_out = train_images.hold_out(recipe.data.calibrate, recipe.seed)
    check_shares(train_images, val_images, processes)
    if single := train_images.single_image_classes():
        few = ", ".join(single[:5]) + (", ..." if len(single) > 5 else "")
        observer.warned(
            f"{len(single)} of {train_images.num_classes} classes have only one training image ({few}); the "
            "levels learn little from it, so add images"
        )
    observer.stage(f"loading {recipe.model.name}")
    pretrained = open_recipe_model(recipe, train_images)
    for notice in pretrained.notices:
        observer.warned(notice)
    teacher = open_recipe_teacher(recipe, pretrained.spec, observer)
    labels = read_class_levels(
        recipe.data.hierarchy,
        train_images.class_names,
        [level.classes for level in recipe.level],
        str(train_images.source),
    )
    return Inputs(train_images, val_images, held_out, pretrained, teacher, labels)


def open_recipe_images(recipe: Recipe) -> tuple[Images, Images]:
    """Open the training and validation images of a recipe."""
    data = recipe.data
    return open_splits(
        data.path,
        train_split=data.train_split,
        validation_split=data.val_split,
        holdout=data.holdout,
        data_root=data.root,
        on_bad_image=data.on_bad_image,
        max_images=data.max_train,
        max_validation_images=data.max_val,
        seed=recipe.seed,
    )


def check_shares(train: Images, validation: Images, processes: int) -> None:
    """Refuse images that would give several processes different numbers of steps.

    Raises:
        RecipeError: if they would.
    """
    if processes == 1:
        return
    where = f"with {processes} processes"
    if train.source.is_stream or validation.source.is_stream:
        raise RecipeError(f"{train.source}: a stream cannot be divided evenly {where}; use a folder or a tar")
    if train.on_bad_image != "refuse":
        raise RecipeError(
            f"data.on_bad_image = {train.on_bad_image!r} would let processes have different numbers of steps "
            f"{where}; set it to refuse"
        )
    if len(validation) < processes:
        raise RecipeError(f"{len(validation)} validation images are too few {where}; use more")


def open_recipe_model(recipe: Recipe, images: Images) -> PretrainedModel:
    """Open the model, and check its classes against those of the images."""
    options = recipe.model
    classes = images.num_classes
    starts_at_random = options.checkpoint is None and not options.pretrained
    if options.new_head and classes is None:
        raise RecipeError(f"model.new_head: {images.source} does not say how many classes it has")
    pretrained = load_pretrained(
        options.name,
        checkpoint=options.checkpoint,
        pretrained=options.pretrained,
        kwargs=options.kwargs,
        new_head_classes=classes if options.new_head or starts_at_random else None,
        input_size=options.input_size,
    )
    spec = pretrained.spec
    if classes is not None and classes != spec.num_classes:
        source = options.checkpoint or options.name
        keys = ", ".join(f"{name}.weight" for name in spec.classifier) or "its classifier"
        raise CheckpointError(
            f"{source} predicts {spec.num_classes} classes ({keys}), {images.source} has {classes}; for a "
            "fresh classifier that is trained first, pass --new-head --finetune-epochs 5"
        )
    return pretrained


def open_recipe_teacher(recipe: Recipe, spec: ModelSpec, observer: Observer) -> nn.Module | None:
    """Open the timm model that teaches, in eval mode; None if the run needs none.

    Args:
        recipe: the recipe.
        spec: description of the model to train, whose classes the teacher must have.
        observer: notified of what was changed when the teacher's checkpoint was read.
    """
    options = recipe.train
    if not options.epochs or options.teacher in TEACHERS:
        return None
    teacher = load_pretrained(
        options.teacher,
        checkpoint=options.teacher_checkpoint,
        options=("train.teacher", "train.teacher_checkpoint"),
    )
    for notice in teacher.notices:
        observer.warned(notice)
    if teacher.spec.num_classes != spec.num_classes:
        raise CheckpointError(
            f"train.teacher = {options.teacher!r} predicts {teacher.spec.num_classes} classes, the model "
            f"{spec.num_classes}; give a teacher that was trained on the same classes"
        )
    return teacher.model


def frozen_teacher(recipe: Recipe, teacher: nn.Module | None, network: nn.Module) -> nn.Module | None:
    """Return the network that teaches, in eval mode; None if there is none, or the full level teaches.

    Args:
        recipe: names the teacher.
        teacher: the timm model that the recipe names, if any.
        network: the dense model of the run, on its device.
    """
    options = recipe.train
    if not options.epochs or options.teacher in ("none", "self"):
        return None
    if options.teacher in ("original", "both"):
        return deepcopy(network).eval()
    return None if teacher is None else teacher.to(next(network.parameters()).device)


def check_optimizer(recipe: Recipe) -> None:
    """Refuse an optimizer that cannot be used, before any work is done.

    Raises:
        RecipeError: if timm does not have it, or not on this machine, or it needs second derivatives.
    """
    name = recipe.train.opt
    try:
        optimizer = create_optimizer_v2(nn.Linear(1, 1), opt=name, lr=recipe.train.lr)
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        known = list_optimizers()
        close = [] if name in known else get_close_matches(name, known, n=3)
        raise RecipeError(
            f"train.opt = {name!r} cannot be used ({error}); try {', '.join(close or USUAL_OPTIMIZERS)}"
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise RecipeError(
            f"train.opt = {name!r} needs second derivatives, which nested training does not compute; "
            f"try {', '.join(USUAL_OPTIMIZERS)}"
        )


def augmentation(recipe: Recipe) -> dict[str, object]:
    """Return the options of timm's `create_transform` for [augment]."""
    augment = recipe.augment
    return {
        "hflip": augment.hflip,
        "vflip": augment.vflip,
        "scale": augment.scale,
        "ratio": augment.ratio,
        "color_jitter": augment.color_jitter or None,
        "auto_augment": augment.auto_augment,
        "re_prob": augment.random_erase,
    }


def stored_dtype(recipe: Recipe) -> torch.dtype:
    """Return the type in which the file stores shared weights."""
    dtype = getattr(torch, recipe.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
