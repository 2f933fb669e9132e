"""Opening the inputs of a recipe: images, model, teacher, optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from nestify.compression.defaults import (
    with_batch_size,
    with_holdout,
    with_learning,
    with_new_head,
    with_whole_outputs,
)
from nestify.compression.models import open_recipe_model, open_recipe_teacher
from nestify.data.dataset import Images, open_splits
from nestify.data.hierarchy import ClassLevels, read_class_levels
from nestify.data.validation import record_held_out
from nestify.errors import DataError, OutputError, RecipeError
from nestify.file.manifest import HeldOut
from nestify.model.batch_norm import norms_over_images
from nestify.model.nested_model import NestedModel
from nestify.model.pretrained import PretrainedModel
from nestify.model.spec import synthetic_input
from nestify.recipe.metric import Metric, metric_of_run
from nestify.recipe.recipe import Recipe
from nestify.training.observer import Observer


@dataclass(frozen=True)
class Inputs:
    """The opened inputs of a recipe.

    Attributes:
        recipe: the recipe, with the options that it leaves open set.
        train_images: images to train on, without those held out.
        val_images: images to evaluate on.
        held_out_record: how the validation images were held out of the training images; None if they are a
            split of their own.
        held_out: training images that are set aside to fit temperatures and consensus weights; None if the
            recipe asks for none.
        pretrained: the model, with as many classes as the images; without labels, with its own classifier.
        teacher: a timm model that teaches, in eval mode; None if the run needs none.
        labels: classes that each level predicts.
        metric: what the levels are judged by.
        batch_size: images per training step and process.
        min_images: images that a training batch must have: 2 if a batch norm has no variance with one.
    """

    recipe: Recipe
    train_images: Images
    val_images: Images
    held_out_record: HeldOut | None
    held_out: Images | None
    pretrained: PretrainedModel
    teacher: nn.Module | None
    labels: ClassLevels
    metric: Metric
    batch_size: int
    min_images: int


def open_inputs(
    recipe: Recipe, observer: Observer, processes: int, class_names: Sequence[str] | None = None
) -> Inputs:
    """Open the images, the model and the teacher of a recipe, and check that they fit each other.

    Args:
        recipe: what to open.
        observer: notified of each stage.
        processes: number of processes that share the run.
        class_names: names of classes or labels in the model's order, if the recipe does not give it; None
            for the order of the data.

    Raises:
        NestifyError: if the recipe, the checkpoint or the images are not right.
    """
    observer.stage("opening images")
    recipe = with_holdout(with_learning(recipe), observer)
    train_images, val_images = open_recipe_images(recipe, class_names)
    held_out_record = None
    if recipe.data.holdout is not None:
        held_out_record = record_held_out(
            train_images, recipe.data.holdout, recipe.seed, recipe.data.train_split
        )
    held_out = None
    if recipe.data.calibrate is not None:
        train_images, held_out = train_images.hold_out(recipe.data.calibrate, recipe.seed)
    check_shares(val_images, processes)
    recipe = with_batch_size(recipe, train_images, processes, observer)
    if single := train_images.single_image_classes():
        few = ", ".join(single[:5]) + (", ..." if len(single) > 5 else "")
        observer.warned(
            f"{len(single)} of {train_images.num_classes} classes have only one training image ({few}); the "
            "levels learn little from it, so add images"
        )
    observer.stage(f"loading {recipe.model.name}")
    pretrained, replaced = open_recipe_model(recipe, train_images, observer)
    pretrained = _with_orientation(pretrained, recipe)
    recipe = with_whole_outputs(recipe, pretrained.spec, observer)
    images_per_step = recipe.train.batch_size * recipe.train.accumulate * processes
    recipe = with_new_head(recipe, replaced, len(train_images) // images_per_step, observer)
    notices = [*train_images.notices, *val_images.notices]
    if train_images.order_notice and not pretrained.new_head:
        hint = "if the checkpoint has another order, give it with --class-names FILE"
        notices.append(f"{train_images.order_notice}; {hint}")
    for notice in dict.fromkeys(notices):
        observer.warned(notice)
    teacher = open_recipe_teacher(recipe, pretrained.spec, observer)
    labels = read_class_levels(
        recipe.data.hierarchy,
        train_images.class_names,
        [level.classes for level in recipe.level],
        str(train_images.source),
    )
    min_images = images_per_statistic(pretrained, train_images, recipe.train.batch_size, processes, observer)
    batch_size = max(min_images, recipe.train.batch_size)
    return Inputs(
        recipe=recipe,
        train_images=train_images,
        val_images=val_images,
        held_out_record=held_out_record,
        held_out=held_out,
        pretrained=pretrained,
        teacher=teacher,
        labels=labels,
        metric=metric_of_run(recipe.data, pretrained.spec.output == "logits"),
        batch_size=batch_size,
        min_images=min_images,
    )


def images_per_statistic(
    pretrained: PretrainedModel, images: Images, batch_size: int, processes: int, observer: Observer
) -> int:
    """Return how many images a batch needs for the statistics of every batch norm: 1 or 2.

    Args:
        pretrained: the model.
        images: the training images.
        batch_size: images per batch, as the recipe says.
        processes: number of processes that share the images.
        observer: receives a warning about each batch of one image that is made larger.

    Raises:
        DataError: if there are too few images.
    """
    model, spec = pretrained.model, pretrained.spec
    norms = norms_over_images(model, synthetic_input(spec.input_size, 1))
    if not norms:
        return 1
    need = f"batch norm ({norms[0]}) sees one value per image, and needs two images or more"
    if len(images) < 2 * processes and not images.source.is_stream:
        each = f" for each of {processes} processes" if processes > 1 else ""
        raise DataError(
            f"{images.source}: {len(images)} training images{each} are too few, because {need}; use more "
            "images, or a larger --input-size"
        )
    if batch_size == 1:
        observer.warned(f"--batch-size 1: {need}, so the run uses batches of 2 images")
    elif len(images) % batch_size == 1 and not images.source.is_stream:
        observer.warned(
            f"{len(images)} training images in batches of {batch_size} leave a batch of one: {need}, so it "
            "is joined to another batch where statistics are measured"
        )
    return 2


def open_recipe_images(recipe: Recipe, class_names: Sequence[str] | None = None) -> tuple[Images, Images]:
    """Open the training and validation images of a recipe.

    Args:
        recipe: the recipe.
        class_names: as for `open_inputs`.
    """
    data = recipe.data
    return open_splits(
        data.path,
        train_split=data.train_split,
        validation_split=data.val_split,
        holdout=data.holdout,
        data_root=data.root,
        class_names=data.class_names or class_names,
        labelled=not data.unlabelled,
        labels=data.labels,
        on_bad_image=data.on_bad_image,
        max_images=data.max_train,
        max_validation_images=data.max_val,
        seed=recipe.seed,
    )


def check_shares(validation: Images, processes: int) -> None:
    """Refuse too few validation images for the processes of a run.

    Raises:
        RecipeError: if a process would have none.
    """
    if len(validation) < processes and not validation.source.is_stream:
        raise RecipeError(
            f"{len(validation)} validation images are too few with {processes} processes; use more"
        )


def _with_orientation(pretrained: PretrainedModel, recipe: Recipe) -> PretrainedModel:
    """Return the model with preprocessing that says whether images are turned upright."""
    preprocessing = {**pretrained.spec.preprocessing, "exif_orientation": recipe.data.exif_orientation}
    return replace(pretrained, spec=replace(pretrained.spec, preprocessing=preprocessing))


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


def round_to_stored(nested: NestedModel, recipe: Recipe) -> None:
    """Round the weights to the stored type, so that the stored values are trained around and evaluated.

    Raises:
        OutputError: if a weight is too large for the type.
    """
    try:
        nested.round_to(stored_dtype(recipe))
    except ValueError as error:
        raise OutputError(f"{recipe.output_path}: {error}; choose another dtype") from None
