"""Options that a recipe leaves open: they get the values that fit the images and the model.

The nested file stores the recipe with these values, so that the run can be repeated as it was.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from nestify.accelerator import has_tf32, is_gpu
from nestify.data.dataset import Images
from nestify.data.source import locate_split
from nestify.errors import DataError, RecipeError
from nestify.model.spec import ModelSpec
from nestify.recipe.level_options import LONG_RUN_RAMP, LONG_RUN_STEPS
from nestify.recipe.options import LEAST_FINETUNE_EPOCHS, USUAL_HOLDOUT, DataOptions
from nestify.recipe.recipe import Recipe
from nestify.training.observer import Observer, Phase
from nestify.training.usual_rate import usual_rate

LEAST_FINETUNE_STEPS = 100
"""Steps that a new classifier is trained for at least, where one pass over the images has few."""

MOST_FINETUNE_EPOCHS = 50


def with_holdout(recipe: Recipe, observer: Observer) -> Recipe:
    """Set `data.holdout` if the data has no validation split and the recipe does not name one.

    Raises:
        DataError: if there are no training images.
        RecipeError: if an option has no meaning for this data.
    """
    data = recipe.data
    if data.holdout is not None or _names_validation(data) or not _lacks_validation(data):
        return recipe
    of_each = "" if data.unlabelled else " of each class"
    observer.warned(
        f"{data.path} has no validation split, so {USUAL_HOLDOUT:.0%} of the images{of_each} are held "
        f"out to validate on (seed {recipe.seed}); to choose others, use --holdout or --val-split"
    )
    return _with(recipe, "data", holdout=USUAL_HOLDOUT)


def with_learning(recipe: Recipe) -> Recipe:
    """Set what is learned from: without labels the teacher alone, from several per image each by itself."""
    if recipe.data.labels is not None and recipe.train.loss == "ce":
        recipe = _with(recipe, "train", loss="bce")
    if not recipe.data.unlabelled:
        return recipe
    recipe = _with(recipe, "finetune", epochs=0)
    return _with(_with(recipe, "model", new_head=False), "train", distill=1.0)


def with_whole_outputs(recipe: Recipe, spec: ModelSpec, observer: Observer) -> Recipe:
    """Set `schedule.keep_outputs` for a backbone: all levels return as much as the original they learn from.

    Args:
        recipe: the recipe.
        spec: description of the model.
        observer: notified of a change.
    """
    if spec.output == "logits" or recipe.schedule.keep_outputs:
        return recipe
    if any(level.width != 1 for level in recipe.level):
        observer.stage(
            f"all levels return all channels of {spec.returned} (schedule.keep_outputs), because they learn "
            "from the original's"
        )
    return _with(recipe, "schedule", keep_outputs=True)


def with_batch_size(recipe: Recipe, images: Images, processes: int, observer: Observer) -> Recipe:
    """Limit `train.batch_size` to the training images that each process has.

    Args:
        recipe: the recipe.
        images: the training images.
        processes: number of processes that share them.
        observer: notified of a change.
    """
    most = max(len(images) // processes, 1)
    if images.source.is_stream or recipe.train.batch_size <= most:
        return recipe
    observer.warned(
        f"{images.source} has only {len(images)} training images, so the batch size is {most} instead of "
        f"{recipe.train.batch_size}; a smaller --batch-size gives more steps"
    )
    return _with(recipe, "train", batch_size=most)


def with_new_head(recipe: Recipe, replaced: bool, steps_per_epoch: int, observer: Observer) -> Recipe:
    """Set `model.new_head` and `finetune.epochs`: a new classifier is trained before the levels are.

    Args:
        recipe: the recipe.
        replaced: whether the classifier of the pretrained model is a new one.
        steps_per_epoch: number of training steps in one pass over the images.
        observer: notified of a change.

    Raises:
        RecipeError: if the fine-tuned model is to be saved, but nothing is fine-tuned.
    """
    epochs = recipe.finetune.epochs
    if epochs is None and replaced:
        enough = -(-LEAST_FINETUNE_STEPS // max(steps_per_epoch, 1))
        epochs = max(LEAST_FINETUNE_EPOCHS, min(enough, MOST_FINETUNE_EPOCHS))
        observer.warned(
            f"the new classifier is trained for {epochs} epochs before the levels are; to choose another "
            "number, use --finetune-epochs"
        )
    if recipe.finetune.save is not None and not epochs:
        raise RecipeError(
            f"finetune.save = {recipe.finetune.save!r} has nothing to save, because the model has the "
            "classes of the images and is not fine-tuned; set --finetune-epochs"
        )
    recipe = _with(recipe, "model", new_head=replaced)
    return _with(recipe, "finetune", epochs=epochs or 0)


def with_ramp(recipe: Recipe, steps: int) -> Recipe:
    """Set `schedule.ramp` by the length of the training.

    While sparsity increases, a level trains weights that it will lose, which a short training has little time
    to make up for.

    Args:
        recipe: the recipe.
        steps: number of steps that train each level.
    """
    if recipe.schedule.ramp is not None:
        return recipe
    return _with(recipe, "schedule", ramp=LONG_RUN_RAMP if steps >= LONG_RUN_STEPS else 0.0)


def with_usual_rates(recipe: Recipe) -> Recipe:
    """Set the learning rates that a recipe leaves open, by the optimizer.

    Raises:
        RecipeError: if `train.min_lr` is above such a rate, which a search without a result takes as well.
    """
    usual = usual_rate(recipe.train.opt)
    if not isinstance(recipe.train.lr, float) and recipe.train.min_lr > usual:
        raise RecipeError(
            f"train.min_lr = {recipe.train.min_lr:g} is above the default learning rate of "
            f"{recipe.train.opt}, {usual:g}; the learning rate falls from --lr (train.lr) to train.min_lr"
        )
    phases: tuple[Phase, ...] = ("finetune", "train")
    return with_rates(recipe, {phase: usual for phase in phases if getattr(recipe, phase).lr is None})


def with_rates(recipe: Recipe, rates: Mapping[Phase, float]) -> Recipe:
    """Set learning rates that were searched.

    Args:
        recipe: the recipe.
        rates: learning rates by the training that they are for.
    """
    for phase, lr in rates.items():
        recipe = _with(recipe, phase, lr=lr)
    return recipe


def with_fast_computing(recipe: Recipe, device: torch.device) -> Recipe:
    """Choose the options of speed that a recipe leaves open: on a GPU they are on, if it supports them.

    Args:
        recipe: the recipe.
        device: the device that computes.
    """
    train, gpu = recipe.train, is_gpu(device)
    chosen: dict[str, bool] = {key: gpu for key in ("amp", "channels_last") if getattr(train, key) is None}
    if gpu and train.tf32 is None:
        chosen["tf32"] = has_tf32(device)
    if gpu and train.cudnn_benchmark is None:
        chosen["cudnn_benchmark"] = True
    return _with(recipe, "train", **chosen)


def _names_validation(data: DataOptions) -> bool:
    return bool(data.val_split != DataOptions.model_fields["val_split"].default)


def _lacks_validation(data: DataOptions) -> bool:
    """Return whether there are training images in files, and no others that could be meant to validate on."""
    train = locate_split(data.path, data.train_split, data.root)
    if train.name:
        return False
    try:
        return train.overlaps(locate_split(data.path, data.val_split, data.root))
    except DataError:
        others = [entry for entry in Path(data.path).iterdir() if entry != Path(train.root or "")]
        return not any(entry.is_dir() or entry.suffix == ".tar" for entry in others)


def _with(recipe: Recipe, section: str, **values: object) -> Recipe:
    options = getattr(recipe, section).model_copy(update=values)
    return recipe.model_copy(update={section: options})
