"""Opening the model and the teacher of a recipe."""

from copy import deepcopy

import torch
from torch import nn

from nestify.data.dataset import Images
from nestify.errors import CheckpointError, DataError, RecipeError, UnsupportedModelError
from nestify.model.pretrained import PretrainedModel, load_pretrained
from nestify.model.spec import ModelSpec
from nestify.recipe.options import TEACHERS
from nestify.recipe.recipe import Recipe
from nestify.training.observer import Observer

OWN_TEACHERS = ("original", "self", "both")
"""Teachers whose frozen part, if any, is the original model."""


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
        _check_backbone(recipe, source, spec)
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


def _check_backbone(recipe: Recipe, source: str, spec: ModelSpec) -> None:
    """Refuse a model without a classifier where one is needed.

    Raises:
        UnsupportedModelError: if it is to learn from labels.
        RecipeError: if options compare predictions of classes.
    """
    if not recipe.data.unlabelled:
        raise UnsupportedModelError(
            f"{source} returns {spec.returned}, which cannot be compared with labels; let the levels learn "
            "from the original alone (--unlabelled), nest it with nestify.nest in a training loop of your "
            "own, or leave features_only and num_classes out of model.kwargs"
        )
    limits = [recipe.gates, *recipe.gates.level.values()]
    if any(each.min_agreement is not None for each in limits):
        raise RecipeError(
            f"gates.min_agreement compares predicted classes, and {source} returns {spec.returned}; use "
            "min_cosine"
        )
    if recipe.train.teacher not in OWN_TEACHERS:
        raise RecipeError(
            f"train.teacher = {recipe.train.teacher!r} predicts classes, and {source} returns "
            f"{spec.returned}; leave it out, so that the levels learn from the original"
        )


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
