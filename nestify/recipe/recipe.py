"""Recipes: all options of a run as one frozen value, made from TOML, flags and defaults. All problems
are reported together.

A recipe is a TOML file with the sections of `recipe.options`; `extends = "other"` builds on another one, and
"none" unsets an optional value. Does not import torch.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from nestify.accelerator import DEVICE_EXAMPLES, DEVICES
from nestify.errors import RecipeError
from nestify.recipe.augment_options import AugmentOptions
from nestify.recipe.flags import Flag, Panel
from nestify.recipe.gates import Gates, baseline_problem
from nestify.recipe.level_options import (
    DEFAULT_LEVELS,
    LevelOptions,
    ScheduleOptions,
    level_name,
    level_problems,
    resolved_levels,
)
from nestify.recipe.levels import MAX_LEVELS, Level
from nestify.recipe.loss_options import loss_problems
from nestify.recipe.model_options import ModelOptions
from nestify.recipe.options import (
    DEFAULT_LR,
    TEACHERS,
    DataOptions,
    Dtype,
    FinetuneOptions,
    Section,
    Text,
    TrainOptions,
    in_schema,
)
from nestify.recipe.problems import Problem, format_toml, section_of, sentence
from nestify.recipe.sources import Table, apply_options, builtin_recipes, parse_setting, read_source
from nestify.recipe.unlabelled import unlabelled_problems

__all__ = [
    "AugmentOptions",
    "DataOptions",
    "FinetuneOptions",
    "LevelOptions",
    "ModelOptions",
    "Recipe",
    "ScheduleOptions",
    "TrainOptions",
    "builtin_recipes",
    "load_recipe",
    "option_help",
    "parse_setting",
]


_DEVICE = "[a-z]+(:[0-9]{1,4})?"


def _device(text: str) -> str:
    if not re.fullmatch(_DEVICE, text):
        raise ValueError(f"is not a device; give {DEVICE_EXAMPLES}")
    return text


class Recipe(Section):
    """All options of one run of `compress`, made by `load_recipe`."""

    output: Annotated[Text | None, Flag(Panel.model, "-o --output")] = Field(
        default=None,
        description="nested file to write; <model>.nested.safetensors in the current folder by default",
    )
    dtype: Annotated[Dtype, Flag(Panel.model)] = Field(
        default="float32", description="data type in which weights are stored"
    )
    seed: Annotated[int, Flag(Panel.training)] = Field(
        default=42, ge=0, lt=2**32, description="seed of every random choice"
    )
    device: Annotated[
        str,
        AfterValidator(_device),
        in_schema(pattern=f"^{_DEVICE}$"),
        Flag(Panel.training, suggestions=DEVICES),
    ] = Field(default="auto", description=f"device to compute on: {DEVICE_EXAMPLES}")
    model: ModelOptions
    data: DataOptions
    augment: AugmentOptions = AugmentOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    level: Annotated[
        tuple[LevelOptions, ...], Field(strict=False), in_schema(minItems=2, maxItems=MAX_LEVELS)
    ] = Field(
        default=tuple(LevelOptions(sparsity=sparsity) for sparsity in DEFAULT_LEVELS["weight"]),
        description="levels, from the core (sparsest) to the full level",
    )
    train: TrainOptions = TrainOptions()
    finetune: FinetuneOptions = FinetuneOptions()
    gates: Gates = Gates()

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels with their names, quantities and patterns resolved, core first."""
        return resolved_levels(self.level, self.schedule)

    @property
    def output_path(self) -> Path:
        """The nested file to write, relative to the current folder unless absolute."""
        if self.output is not None:
            return Path(self.output)
        stem = re.split(r"[/\\:]", self.model.name.rstrip("/\\"))[-1]
        return Path(f"{stem}.nested.safetensors")

    def to_dict(self) -> dict[str, Any]:
        """Return every option as plain JSON values, in a fixed order, for `Recipe.model_validate`."""
        return self.model_dump(mode="json")


class WrongOptionsError(RecipeError):
    """Options of a recipe are wrong; the others can still be checked.

    Args:
        problems: one sentence per problem.
        source: the recipe's path, or "" for the command line.
        recipe: the recipe, with defaults in place of what is wrong.
        keys: dotted keys of what is wrong.
    """

    def __init__(self, problems: list[str], source: str, recipe: Recipe, keys: Sequence[str]) -> None:
        super().__init__(problems, source)
        self.source = source
        self.recipe = recipe
        self.keys = keys


def load_recipe(source: str | PathLike[str], overrides: Mapping[str, object] | None = None) -> Recipe:
    """Read a recipe, apply overrides, and check all of it.

    Args:
        source: the path of a `.toml` or `.json` file, the name of a built-in recipe, or a timm model's name.
            Whether timm has such a model is checked where the model is made.
        overrides: dotted keys and values that replace the recipe's: `{"train.epochs": 3}`. `levels` replaces
            all levels (`"0.95,0.8,0"`, `"1:4,2:4,0"`, or a list of such values); `level[1].weight` then
            changes one. None means not given.

    Raises:
        RecipeError: with every problem that was found; also for a recipe with a [matrix].
    """
    table, place = read_source(source)
    if "matrix" in table:
        raise RecipeError(
            "[matrix] makes several runs of this recipe; start them with nestify batch, or remove it", place
        )
    return checked_recipe(table, place, overrides)


def checked_recipe(
    table: Table, place: str, overrides: Mapping[str, object] | None = None, by: str = "an option"
) -> Recipe:
    """Check a table from `read_source` with overrides applied, and return the recipe.

    Args:
        table: the table.
        place: what errors call the recipe's place.
        overrides: see `load_recipe`.
        by: what errors call the place of the overrides.

    Raises:
        RecipeError: with every problem that was found.
    """
    options = {key: value for key, value in (overrides or {}).items() if value is not None}
    table, problems = apply_options(table, options)
    recipe, more_problems = _check(table, [problem.key for problem in problems])
    if problems := problems + more_problems:
        changed = ["level" if key == "levels" else key for key in options]
        texts = [_problem_sentence(problem, changed if place else [], by) for problem in problems]
        raise WrongOptionsError(texts, place, recipe, [problem.key for problem in problems])
    return recipe


def option_help(key: str) -> str:
    """Return the help text of an option, with its default: `option_help("train.epochs")`.

    Args:
        key: dotted key of the option.

    Raises:
        KeyError: for a key that recipes do not have.
    """
    *outer, name = key.split(".")
    section = section_of(Recipe.model_fields[outer[0]]) if outer else Recipe
    if section is None or len(outer) > 1:
        raise KeyError(key)
    field = section.model_fields[name]
    if field.is_required() or field.default in (None, ()):
        return str(field.description)
    default = field.default if isinstance(field.default, str) else format_toml(field.default)
    return f"{field.description} (default {default})"


def _problem_sentence(problem: Problem, changed: Sequence[str], by: str) -> str:
    """Return a problem's sentence, which says if the value is not from the file."""
    return problem.text + (f" (set by {by})" if is_affected(problem.key, changed) else "")


def is_affected(key: str, others: Iterable[str]) -> bool:
    """Return whether a dotted key is one of the others, or inside or around one.

    Args:
        key: dotted key, such as `train.lr`.
        others: dotted keys.
    """
    return any(_is_inside(key, other) or _is_inside(other, key) for other in others)


def _is_inside(key: str, outer: str) -> bool:
    return key == outer or key.startswith((f"{outer}.", f"{outer}["))


def _check(table: Table, broken: Iterable[str]) -> tuple[Recipe, list[Problem]]:
    """Return the recipe, as far as it is valid, and all of its problems.

    Options that are invalid by themselves take their default in a second pass, which finds options that do
    not fit together; `broken` keys and those options are left out of it.
    """
    table = {"model": {}, "data": {}} | table
    problems: list[Problem] = []
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        problems = [sentence(Recipe, each) for each in errors]
        recipe = Recipe.model_validate(_without(table, [each["loc"] for each in errors]))
    broken = [*broken, *(problem.key for problem in problems)]
    more = _level_problems(recipe, broken) + _conflicts(recipe, broken) + _gate_problems(recipe, broken)
    keys = [*broken, *(problem.key for problem in more)]
    found = unlabelled_problems(recipe) + loss_problems(recipe)
    return recipe, problems + more + [each for each in found if not is_affected(each.key, keys)]


def _without(table: Table, paths: Iterable[tuple[str | int, ...]]) -> Table:
    """Return a recipe's table without some options; a level is emptied, so that others keep their numbers."""
    rest = deepcopy(table)
    for path in paths:
        *outer, last = path[: 3 if path[0] == "level" else 2]
        parent: Any = rest
        for part in outer:
            parent = parent[part]
        if isinstance(last, int):
            parent[last] = {}
        else:
            parent.pop(last, None)
    rest.setdefault("model", {}).setdefault("name", "unknown")
    rest.setdefault("data", {}).setdefault("path", "unknown")
    return rest


def _level_problems(recipe: Recipe, broken: Sequence[str]) -> list[Problem]:
    return [] if "level" in broken else level_problems(recipe.level, recipe.schedule, broken)


def _gate_problems(recipe: Recipe, broken: Sequence[str]) -> list[Problem]:
    """Return limits of levels that the recipe does not have, and limits that lack their baseline."""
    problems = []
    if text := baseline_problem(recipe.gates):
        problems.append(Problem("gates.max_regression", text))
    if not any(is_affected("level", [key]) for key in broken):
        names = [level_name(level, k) for k, level in enumerate(recipe.level, start=1)]
        problems += [
            Problem(
                f"gates.level.{name}",
                f"gates.level.{name} is no level of the recipe; its levels are {', '.join(names)}",
            )
            for name in recipe.gates.unknown_levels(names)
        ]
    return [problem for problem in problems if not is_affected(problem.key, broken)]


def _conflicts(recipe: Recipe, broken: Sequence[str]) -> list[Problem]:
    """Return problems of options that are valid by themselves but not together."""
    model, train, finetune = recipe.model, recipe.train, recipe.finetune
    full = recipe.level[-1] if recipe.level else LevelOptions()
    rules: list[tuple[tuple[str, str], bool, str]] = [
        (
            ("model.new_head", "finetune.epochs"),
            model.new_head is True and finetune.epochs == 0,
            "model.new_head = true needs finetune.epochs above 0; a fresh classifier must learn first",
        ),
        (
            ("finetune.save", "finetune.epochs"),
            finetune.save is not None and finetune.epochs == 0,
            f"finetune.save = {format_toml(finetune.save)} has nothing to save; set finetune.epochs above 0",
        ),
        (
            ("train.teacher_checkpoint", "train.teacher"),
            train.teacher_checkpoint is not None and train.teacher in TEACHERS,
            f"train.teacher_checkpoint = {format_toml(train.teacher_checkpoint)} has no use with "
            f"train.teacher = {format_toml(train.teacher)}; set train.teacher to the name of a timm model",
        ),
        (
            ("train.min_lr", "train.lr"),
            train.min_lr > (train.lr if isinstance(train.lr, float) else DEFAULT_LR),
            f"train.min_lr = {train.min_lr:g} is above "
            + ("the default of train.lr" if train.lr is None else f"train.lr = {format_toml(train.lr)}")
            + "; the learning rate falls from lr to min_lr"
            + ("" if isinstance(train.lr, float) else f", and the default is at most {DEFAULT_LR:g}"),
        ),
        (
            ("train.warmup_epochs", "train.epochs"),
            train.warmup_epochs > train.epochs > 0,
            f"train.warmup_epochs = {train.warmup_epochs:g} is above train.epochs = {train.epochs:g}; "
            "the warmup is part of the training",
        ),
        *(
            (
                (f"level[{k}].classes", "data.hierarchy"),
                level.classes is not None and recipe.data.hierarchy is None,
                f"level[{k}].classes = {format_toml(level.classes)} needs data.hierarchy; set it to a CSV "
                "table with such a column",
            )
            for k, level in enumerate(recipe.level, start=1)
        ),
        (
            (f"level[{len(recipe.level)}].classes", "level"),
            full.classes is not None,
            f"level[{len(recipe.level)}].classes = {format_toml(full.classes)}: the full level predicts the "
            "data's own classes; leave it out",
        ),
        (
            ("level", "level"),
            bool(recipe.level) and all(level.weight == 0 for level in recipe.level),
            "every level has weight = 0, so nothing would be trained; give one of them more",
        ),
        (
            (f"level[{len(recipe.level)}].weight", "train.teacher"),
            full.weight == 0 and train.teacher in ("self", "both"),
            f"train.teacher = {format_toml(train.teacher)} learns from the full level, which level["
            f"{len(recipe.level)}].weight = 0 leaves untrained; choose another teacher",
        ),
    ]
    return [
        Problem(keys[0], text)
        for keys, wrong, text in rules
        if wrong and not any(is_affected(key, broken) for key in keys)
    ]
