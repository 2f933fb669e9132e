"""Checks of a recipe that open neither images nor models: all problems are found at once, in seconds."""

import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from nestify.accelerator import pick_device
from nestify.data.labels import read_labels
from nestify.data.source import locate_split
from nestify.engine.library import load_library
from nestify.errors import DataError, NestifyError, OutputError, RecipeError, foreign_code, joined
from nestify.exports.onnx import import_packages
from nestify.files import checkpoint_path, is_same_file, metrics_path, sibling
from nestify.model.pretrained import check_name
from nestify.model.weights_file import check_is_file
from nestify.recipe.options import TEACHERS
from nestify.recipe.recipe import Recipe, WrongOptionsError, is_affected
from nestify.training.logs import check_logs

USUAL_OPTIMIZERS = ("sgd", "adamw", "lamb")


def check_recipe(recipe: Recipe) -> None:
    """Check that a run has what its recipe names: the model, files, packages, a device, writable folders.

    Args:
        recipe: the recipe.

    Raises:
        NestifyError: with every problem that was found.
    """
    if problems := _problems(recipe, ()):
        raise joined(problems)


def with_further_problems(error: WrongOptionsError) -> NestifyError:
    """Add to the problems of a recipe those that `check_recipe` finds in its valid options.

    Args:
        error: what `load_recipe` raised.
    """
    return joined([error, *_problems(error.recipe, error.keys)])


def _problems(recipe: Recipe, broken: Sequence[str]) -> list[NestifyError]:
    """Return the problems of a recipe, except with options of the given keys."""
    model, data, train = recipe.model, recipe.data, recipe.train
    checks: list[tuple[str, Callable[[], object]]] = [
        ("model.name", partial(check_name, model.name)),
        ("train.opt", partial(_check_optimizer, train.opt)),
        ("data.path", partial(locate_split, data.path, data.train_split, data.root)),
        ("level", partial(_check_engine, recipe)),
        ("device", partial(pick_device, recipe.device)),
        ("train.log", partial(check_logs, train.log)),
        ("output", partial(_check_outputs, recipe)),
    ]
    if data.holdout is None and data.val_split != type(data).model_fields["val_split"].default:
        checks.append(("data.path", partial(locate_split, data.path, data.val_split, data.root)))
    if model.checkpoint is not None:
        checks.append(("model.checkpoint", partial(check_is_file, Path(model.checkpoint))))
    if train.teacher not in TEACHERS:
        checks.append(("train.teacher", partial(check_name, train.teacher, "train.teacher")))
    if train.teacher_checkpoint is not None:
        checks.append(("train.teacher_checkpoint", partial(check_is_file, Path(train.teacher_checkpoint))))
    if data.labels is not None:
        checks.append(("data.labels", partial(read_labels, data.labels)))
    if data.hierarchy is not None:
        checks.append(("data.hierarchy", partial(_check_table, Path(data.hierarchy))))
    if recipe.finetune.save is not None:
        checks.append(("finetune.save", partial(_check_save, recipe, Path(recipe.finetune.save))))
    problems: list[NestifyError] = []
    for key, check in checks:
        try:
            if not is_affected(key, broken):
                check()
        except NestifyError as error:
            if str(error) not in map(str, problems):
                problems.append(error)
    return problems


def _check_outputs(recipe: Recipe) -> None:
    output = recipe.output_path
    check_output(recipe, "output", output)
    check_output(recipe, "the checkpoint next to the output", checkpoint_path(output))
    check_output(recipe, "the log next to the output", metrics_path(output))
    if "csv" in recipe.train.log:
        check_output(recipe, "the table next to the output", sibling(output, ".csv"))
        check_output(recipe, "the table of the fine-tuning", sibling(output, ".finetune.csv"))


def _check_save(recipe: Recipe, path: Path) -> None:
    check_output(recipe, "finetune.save", path)
    output = recipe.output_path
    for what, other in (("output", output), ("the run's checkpoint", checkpoint_path(output))):
        if is_same_file(path, other):
            raise OutputError(f"finetune.save = {path} is {what} too; give each file a name of its own")


def _check_engine(recipe: Recipe) -> None:
    """Refuse budgets of latency without the sparse engine, which the levels are measured on."""
    if any(level.budget is not None and level.budget.startswith("latency") for level in recipe.level):
        load_library()
        import_packages()


def _check_optimizer(name: str) -> None:
    """Refuse an optimizer that cannot be used.

    Raises:
        RecipeError: if timm does not have it, or not on this machine, or it needs second derivatives.
    """

    def describe(reason: str) -> RecipeError:
        known = list_optimizers()
        close = [] if name in known else get_close_matches(name, known, n=3)
        return RecipeError(f"train.opt = {name!r} cannot be used ({reason}); try {_any_of(close)}")

    with foreign_code(describe):
        optimizer = create_optimizer_v2(nn.Linear(1, 1), opt=name, lr=0.1)
    if getattr(optimizer, "is_second_order", False):
        raise RecipeError(
            f"train.opt = {name!r} needs second derivatives, which nested training does not compute; "
            f"try {_any_of(())}"
        )


def _any_of(optimizers: Sequence[str]) -> str:
    return ", ".join(optimizers or USUAL_OPTIMIZERS)


def _check_table(path: Path) -> None:
    if not os.path.isfile(path):
        raise DataError(f"data.hierarchy = {path} is not a file; give the path of a CSV table")


def check_output(recipe: Recipe, option: str, path: Path) -> None:
    """Check that a result can be written, and that it replaces no input of the run but the baseline."""
    model, data, train = recipe.model, recipe.data, recipe.train
    inputs = {
        "checkpoint": (model.checkpoint, train.teacher_checkpoint),
        "table": (data.labels, data.hierarchy),
        "list of class names": (data.class_names,),
    }
    try:
        if path.is_dir():
            raise OutputError(f"{option} = {path} is a folder; give the path of a file in it")
        if path.exists() and not path.is_file():
            raise OutputError(f"{option} = {path} is not a regular file; choose another path")
        for what, paths in inputs.items():
            if any(is_same_file(path, other) for other in paths if other):
                raise OutputError(f"{option} = {path} is the {what} of this run; choose another path")
        with TemporaryFile(dir=Path(os.path.realpath(path)).parent):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL, or a character that no name can have
        raise OutputError(
            f"{option} = {path} cannot be written ({getattr(error, 'strerror', None) or error}); "
            "choose a folder that exists and can be written to"
        ) from error
