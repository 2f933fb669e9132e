"""Opening the inputs of a recipe: images, model, teacher, optimizer."""

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn

from nestify.compression.defaults import with_batch_size, with_holdout, with_learning, with_new_head
from nestify.data.dataset import Images, open_splits
from nestify.data.hierarchy import ClassLevels, read_class_levels
from nestify.data.validation import record_held_out
from nestify.errors import CheckpointError, DataError, OutputError, RecipeError, UnsupportedModelError
from nestify.file.manifest import HeldOut
from nestify.model.batch_norm import norms_over_images
from nestify.model.nested_model import NestedModel
from nestify.model.pretrained import PretrainedModel, load_pretrained
from nestify.model.spec import ModelSpec, synthetic_input
from nestify.recipe.options import TEACHERS
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
    batch_size: int
    min_images: int


def open_inputs(recipe: Recipe, observer: Observer, processes: int) -> Inputs:
    """Open the images, the model and the teacher of a recipe, and check that they fit each other.

    Args:
        recipe: what to open.
        observer: notified of each stage.
        processes: number of processes that share the run.

    Raises:
        NestifyError: if the recipe, the checkpoint or the images are not right.
    """
    observer.stage("opening images")
    recipe = with_holdout(with_learning(recipe), observer)
    train_images, val_images = open_recipe_images(recipe)
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


def open_recipe_images(recipe: Recipe) -> tuple[Images, Images]:
    """Open the training and validation images of a recipe."""
    data = recipe.data
    return open_splits(
        data.path,
        train_split=data.train_split,
        validation_split=data.val_split,
        holdout=data.holdout,
        data_root=data.root,
        class_names=data.class_names,
        labelled=not data.unlabelled,
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


def open_recipe_model(recipe: Recipe, images: Images, observer: Observer) -> tuple[PretrainedModel, bool]:
    """Open the model, with a new classifier if the recipe asks for one or the classes of the images differ.

    Args:
        recipe: names the model.
        images: the training images.
        observer: notified of what was changed.

    Returns:
        The model, and whether the classifier of a pretrained model was replaced.

    Raises:
        RecipeError: if the images do not say how many classes a new classifier needs.
        CheckpointError: if the classes differ, and the classifier is to be kept.
    """
    options = recipe.model
    classes = images.num_classes
    starts_at_random = options.checkpoint is None and not options.pretrained
    if options.new_head and classes is None:
        raise RecipeError(f"--new-head: {images.source} does not say how many classes it has")

    def load(new_head: bool) -> PretrainedModel:
        return load_pretrained(
            options.name,
            checkpoint=options.checkpoint,
            pretrained=options.pretrained,
            kwargs=options.kwargs,
            new_head_classes=classes if new_head or (starts_at_random and images.labelled) else None,
            input_size=options.input_size,
        )

    replaced = bool(options.new_head)
    random_state = torch.get_rng_state()
    pretrained = load(replaced)
    source = options.checkpoint or options.name
    spec = pretrained.spec
    if spec.output != "logits":
        raise UnsupportedModelError(
            f"{source} returns {spec.returned}, and compress trains classifiers on labels; nest it with "
            "nestify.nest in a training loop of your own, or leave features_only and num_classes out of "
            "model.kwargs"
        )
    if classes is not None and classes != spec.num_classes:
        if not images.labelled:
            raise DataError(
                f"{source} predicts {spec.num_classes} classes, and --class-names gives {classes} names; "
                "give one name for each, in the order of its outputs, or leave out --class-names"
            )
        if options.new_head is False:
            keys = ", ".join(f"{name}.weight" for name in spec.classifier) or "its classifier"
            raise CheckpointError(
                f"{source} predicts {spec.num_classes} classes ({keys}), {images.source} has {classes}; "
                "leave out --keep-head to train a new classifier"
            )
        observer.warned(
            f"{source} predicts {spec.num_classes} classes, {images.source} has {classes}, so the classifier "
            "is replaced by a new one; if the number of classes is wrong, check --data"
        )
        replaced = True
        torch.set_rng_state(random_state)  # the same weights as with --new-head
        pretrained = load(replaced)
    for notice in pretrained.notices:
        observer.warned(notice)
    return pretrained, replaced


def _with_orientation(pretrained: PretrainedModel, recipe: Recipe) -> PretrainedModel:
    """Return the model with preprocessing that says whether images are turned upright."""
    preprocessing = {**pretrained.spec.preprocessing, "exif_orientation": recipe.data.exif_orientation}
    return replace(pretrained, spec=replace(pretrained.spec, preprocessing=preprocessing))


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


OWN_TEACHERS = ("original", "self", "both")
"""Teachers whose frozen part, if any, is the original model."""


def frozen_teacher(recipe: Recipe, teacher: nn.Module | None, network: nn.Module) -> nn.Module | None:
    """Return the network that teaches, in eval mode; None if there is none, or the full level teaches.

    Without labels a full level that teaches the others learns from the original model itself.

    Args:
        recipe: names the teacher.
        teacher: the timm model that the recipe names, if any.
        network: the dense model of the run, on its device.
    """
    options = recipe.train
    if not options.epochs or options.teacher == "none":
        return None
    if options.teacher == "self" and not recipe.data.unlabelled:
        return None
    if options.teacher in OWN_TEACHERS:
        return deepcopy(network).eval()
    return None if teacher is None else teacher.to(next(network.parameters()).device)


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
