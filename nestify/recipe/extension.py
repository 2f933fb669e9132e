"""The recipe of a run that adds levels to a nested file. Does not import torch.

What the file's levels depend on follows from the file: the model, the schedule, the classes. Everything else
has the value of the recipe that made the file, unless it is given.
"""

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from nestify.errors import BadFileError, RecipeError
from nestify.recipe.level_options import Kind
from nestify.recipe.level_texts import parse_levels
from nestify.recipe.levels import Level
from nestify.recipe.metric import MAP, Metric
from nestify.recipe.options import OWN_LOOP, TEACHERS
from nestify.recipe.problems import sentence
from nestify.recipe.recipe import Recipe, checked_recipe
from nestify.recipe.sources import Table

SET_BY_FILE = (
    *("dtype", "model.name", "model.kwargs", "model.input_size", "model.new_head", "model.pretrained"),
    *("data.hierarchy", "data.exif_orientation", "data.holdout", "train.bn"),
    *("schedule.kind", "schedule.divisor", "schedule.pattern", "schedule.skip", "schedule.rank"),
    "schedule.keep_outputs",
    *("finetune.epochs", "finetune.lr", "finetune.save"),
)
"""Options that the levels of a file depend on, so that a run which adds levels cannot change them.

A table includes all keys in it.
"""


@dataclass(frozen=True)
class Extended:
    """What a nested file says about the levels that it has.

    Attributes:
        name: path or address of the file, for messages.
        recipe: the recipe of the run that made its highest level, as plain JSON values.
        kind: kind of its schedule.
        levels: its levels, core first.
        architecture: timm's name of its architecture, without a tag.
        kwargs: further arguments of `timm.create_model`.
        input_size: (channels, height, width) in pixels.
        metric: what its levels are judged by; None if they were not evaluated.
    """

    name: str
    recipe: Mapping[str, Any]
    kind: Kind
    levels: Sequence[Level]
    architecture: str
    kwargs: Mapping[str, Any]
    input_size: tuple[int, int, int]
    metric: Metric | None = None


def extension_recipe(file: Extended, levels: object, overrides: Mapping[str, object]) -> Recipe:
    """Return the recipe of a run that adds levels to a file; the file's levels are its first levels.

    Args:
        file: the file.
        levels: the levels to add, as in `levels` of `load_recipe`: `"0"`, `"0.5,0"`, or a list.
        overrides: dotted keys and values, as in `load_recipe`.

    Raises:
        RecipeError: if the file has a full level already, the new levels do not continue its own, an option
            that follows from the file is given, or one that the file does not have is missing.
        BadFileError: if the file's recipe cannot be used.
    """
    options = {key: value for key, value in overrides.items() if value is not None}
    _check_not_full(file)
    _check_free(file, options)
    _check_metric(file, options)
    recorded = _recorded(file)
    table = deepcopy(recorded.to_dict())
    for key in ("output", "gates", "finetune"):
        table.pop(key)
    table["model"] = _model(file, recorded, options)
    table["data"] |= {"root": None, "hierarchy": None, "class_names": None, "workers": None}
    if "data.path" not in options and not os.path.exists(recorded.data.path):
        gone = f"and there is no {recorded.data.path!r} here, which {file.name} was trained on"
        if recorded.data.path == OWN_LOOP:
            gone = f"and {file.name} was trained in a loop of its own"
        raise RecipeError(f"data.path is not given, {gone}; give the images to train on")
    if recorded.train.teacher not in TEACHERS and "train.teacher" not in options:
        raise RecipeError(
            f"{file.name} was trained with train.teacher = {recorded.train.teacher!r}; give it again, or the "
            "original as the teacher"
        )
    table["train"] |= {"teacher_checkpoint": None, "log": []}
    added, problems = parse_levels(levels, file.kind)
    if problems:
        raise RecipeError([problem.text for problem in problems])
    table["level"] = [*map(_level_table, file.levels), *added]
    table["level"][len(file.levels) - 1]["freeze"] = True
    return checked_recipe(table, file.name, options)


def _check_not_full(file: Extended) -> None:
    top = file.levels[-1]
    if (top.sparsity, top.width, top.depth) == (0, 1, 1):
        raise RecipeError(
            f"{file.name}: its highest level, {top.name}, is a full level already, so that no level can be "
            "added above it; `nestify slice` makes a file that ends at a lower level"
        )


def _check_free(file: Extended, options: Mapping[str, object]) -> None:
    """Refuse options that follow from the file."""
    own = (
        *(f"level[{k}]." for k in range(1, len(file.levels) + 1)),
        *(f"{key}." for key in SET_BY_FILE),
    )
    wrong = [
        key for key in options if key in SET_BY_FILE or key in ("level", "levels") or key.startswith(own)
    ]
    if wrong:
        raise RecipeError(
            [f"{key} follows from {file.name}, whose levels stay as they are; leave it out" for key in wrong]
        )


def _check_metric(file: Extended, options: Mapping[str, object]) -> None:
    """Refuse options by which new levels would be judged by something else, so could not be compared."""
    metric = file.metric
    if metric is None:
        return
    wrong = []
    if options.get("data.unlabelled", metric.is_comparison) != metric.is_comparison:
        wrong.append("data.unlabelled")
    if "data.labels" in options and metric is not MAP:
        wrong.append("data.labels")
    if wrong:
        raise RecipeError(
            [
                f"{key}: the levels of {file.name} are judged by their {metric.title}, so that levels above "
                "them must be too; leave it out"
                for key in wrong
            ]
        )


def _recorded(file: Extended) -> Recipe:
    try:
        return Recipe.model_validate(dict(file.recipe))
    except ValidationError as error:
        first = sentence(Recipe, error.errors(include_url=False)[0])
        raise BadFileError(
            f"{file.name}: its recipe cannot be used by this version ({first.text}); extend it with the "
            "version of nestify that made it"
        ) from None


def _model(file: Extended, recorded: Recipe, options: Mapping[str, object]) -> Table:
    """Return [model]: the file's architecture, with weights that the user names or that timm publishes."""
    # A name that a file contains may lead to a folder or a server; only timm's own names are followed.
    name = recorded.model.name if recorded.model.pretrained else ""
    published = name.partition(".")[0] == file.architecture and recorded.model.checkpoint is None
    if "model.checkpoint" not in options and not published:
        raise RecipeError(
            f"model.checkpoint is not given; give the original model that {file.name} was made from, whose "
            "weights the new levels start from"
        )
    return {
        "name": name if published else file.architecture,
        "pretrained": True,
        "kwargs": {key: value for key, value in file.kwargs.items() if _is_kept(key, value)},
        "new_head": False,
        "input_size": list(file.input_size[1:]),
    }


def _is_kept(argument: str, value: object) -> bool:
    """Whether an argument of the file's model makes that of the new levels; the rest follows from other keys.

    The number of classes is the checkpoint's; without a classifier it is 0.
    """
    return argument != "img_size" and (argument != "num_classes" or value == 0)


def _level_table(level: Level) -> Table:
    return {
        "name": level.name,
        "sparsity": level.sparsity,
        "pattern": str(level.pattern),
        "width": level.width,
        "depth": level.depth,
    }
