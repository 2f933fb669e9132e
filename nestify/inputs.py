"""What a recipe names, opened: device, images, model."""

import os

import torch

from nestify.errors import CheckpointError, RecipeError
from nestify.images import Images, open_splits
from nestify.pretrained import PretrainedModel, load_pretrained
from nestify.recipe import Recipe


def pick_device(name: str) -> torch.device:
    """The device of a recipe; `auto` is CUDA where there is one, else the CPU.

    Raises:
        RecipeError: for a device that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device = {name!r} is not available here; give auto or cpu") from error
    return device


def pick_workers(asked: int | None, device: torch.device) -> int:
    """Processes that load images; none on a CPU, where they would take the cores from the arithmetic."""
    if asked is not None:
        return asked
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def open_recipe_images(recipe: Recipe) -> tuple[Images, Images]:
    """Training and validation images of a recipe."""
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


def open_recipe_model(recipe: Recipe, images: Images) -> PretrainedModel:
    """The model, its classes checked against those of the images."""
    options = recipe.model
    classes = images.num_classes
    starts_at_random = options.checkpoint is None and not options.pretrained
    if options.new_head and classes is None:
        raise RecipeError(f"model.new_head: {images.source} does not tell how many classes it has")
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
            f"{source} tells {spec.num_classes} classes ({keys}), {images.source} has {classes}; for a fresh "
            "classifier that is learned first, pass --set model.new_head=true --set finetune.epochs=5"
        )
    return pretrained


def augmentation(recipe: Recipe) -> dict[str, object]:
    """The options of timm's `create_transform` that [augment] stands for."""
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
