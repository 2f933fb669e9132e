"""The variants of recipes: every combination of the values in a recipe's [matrix]."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from types import MappingProxyType
from typing import Any

from nestify.addresses import hide_passwords
from nestify.errors import RecipeError
from nestify.recipe.problems import format_toml
from nestify.recipe.recipe import Recipe, checked_recipe
from nestify.recipe.sources import read_source

MAX_VARIANTS = 10_000
"""Largest number of jobs of one recipe; more are assumed to be a mistake."""

NO_SETTINGS: Mapping[str, object] = MappingProxyType({})

MAX_NAME_BYTES = 120  # file systems allow 255, and files in the folder need some of a path's length too
_UNSAFE = re.compile(r"[^\w.,+=-]")


@dataclass(frozen=True)
class Variant:
    """One recipe, with one value for each option in its matrix.

    Attributes:
        name: safe as a folder's name: the recipe's stem, and the options, as in `cifar-lr=0.03-seed=1`.
        source: the recipe as given.
        options: options of the matrix and of --set, by dotted key.
    """

    name: str
    source: str
    options: Mapping[str, Any]
    recipe: Recipe


def expand(sources: Sequence[str], settings: Mapping[str, object] = NO_SETTINGS) -> list[Variant]:
    """Return all variants of recipes, in the given order; the last option of a matrix changes fastest.

    Args:
        sources: the recipes.
        settings: options that replace those of every recipe, by dotted key.

    Raises:
        RecipeError: with every problem of every recipe.
    """
    variants: list[Variant] = []
    problems: list[str] = [] if sources else ["a batch needs at least one recipe"]
    for source in sources:
        try:
            variants += _expand_one(source, settings)
        except RecipeError as error:
            problems += str(error).split("\n")
    problems += _check_names(variants)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return variants


def _expand_one(source: str, settings: Mapping[str, object]) -> list[Variant]:
    table, place = read_source(source)
    matrix = table.pop("matrix", None)
    if problems := _matrix_problems(matrix) + _set_twice(matrix, settings):
        raise RecipeError(problems, place)
    by = " or ".join(name for name, given in (("[matrix]", matrix), ("--set", settings)) if given)
    axes: Mapping[str, list[Any]] = matrix or {}
    stem = _safe(re.split(r"[/\\:]", source)[-1].removesuffix(".toml").removesuffix(".json"))
    variants: list[Variant] = []
    found: dict[str, None] = {}  # a set that keeps its order
    for values, words in zip(product(*axes.values()), product(*_option_words(axes)), strict=True):
        options = {**settings, **dict(zip(axes, values, strict=True))}
        try:
            recipe = checked_recipe(table, place, options, by=by)
        except RecipeError as error:
            found |= dict.fromkeys(str(error).split("\n"))
            continue
        variants.append(Variant(_short("-".join((stem, *words))), source, options, recipe))
    if found:
        raise RecipeError(list(found))
    return variants


def _matrix_problems(matrix: object) -> list[str]:
    if matrix is None:
        return []
    if not isinstance(matrix, dict):
        return [
            f"matrix = {format_toml(matrix)} is not a table; write [matrix] and options with lists of values"
        ]
    if not matrix:
        return ['[matrix] has no options; give it some, such as "train.lr" = [0.01, 0.03], or remove it']
    problems = []
    for key, values in matrix.items():
        if key in ("output", "finetune.save"):
            problems.append(f"matrix.{key} has no use, for each job writes to its own folder; remove it")
        elif not isinstance(values, list):
            problems.append(
                f"matrix.{key} = {format_toml(values)} is not a list of values; put it in brackets"
            )
        elif not values:
            problems.append(f"matrix.{key} is an empty list, which makes no job; give it values or remove it")
        elif twice := [text for text, count in Counter(map(_canonical, values)).items() if count > 1]:
            problems.append(f"matrix.{key} has {format_toml(json.loads(twice[0]))} twice; remove one")
    count = prod(len(values) for values in matrix.values() if isinstance(values, list))
    if count > MAX_VARIANTS:
        problems.append(f"[matrix] makes {count} jobs, more than {MAX_VARIANTS}; make its lists shorter")
    return problems


def _set_twice(matrix: object, settings: Mapping[str, object]) -> list[str]:
    """Return problems of options that are both in the matrix and in --set."""
    keys = matrix if isinstance(matrix, dict) else {}
    return [f"matrix.{key} is also given by --set; give it once" for key in settings if key in keys]


def _check_names(variants: Sequence[Variant]) -> Iterable[str]:
    """Return problems of jobs with the same folder, also on file systems that ignore case."""
    first: dict[str, Variant] = {}
    for variant in variants:
        other = first.setdefault(variant.name.casefold(), variant)
        if other is not variant:
            yield (
                f"{other.source} and {variant.source} both make a job {variant.name}; "
                "rename one of the recipes, or run them in batches of their own"
            )


def _option_words(axes: Mapping[str, list[Any]]) -> list[list[str]]:
    """Return `lr=0.01` and so on: the last part of the option's key, or all of it if ambiguous."""
    lasts = Counter(_last(key) for key in axes)
    return [
        [f"{_safe(_last(key) if lasts[_last(key)] == 1 else _plain(key))}={text}" for text in _texts(values)]
        for key, values in axes.items()
    ]


def _plain(key: str) -> str:
    return key.replace("[", "").replace("]", "")


def _last(key: str) -> str:
    return _plain(key) if key.startswith("level[") else key.rpartition(".")[2]


def _texts(values: list[Any]) -> list[str]:
    """Return values as parts of a name; equal or long ones get a hash."""
    raw = [hide_passwords(value) if isinstance(value, str) else format_toml(value) for value in values]
    safe = [_safe(re.sub(r'["\[\] ]', "", text)) for text in raw]
    alike = Counter(text.casefold() for text in safe)
    return [
        text if alike[text.casefold()] == 1 else f"{text}~{_hash(_canonical(value))}"
        for text, value in zip(safe, values, strict=True)
    ]


def _safe(text: str) -> str:
    """Return a name of letters, digits and a few signs that is not hidden, `..` or empty."""
    return _UNSAFE.sub("-", text).lstrip(".") or "x"


def _short(name: str) -> str:
    raw = name.encode()
    if len(raw) <= MAX_NAME_BYTES:
        return name
    return f"{raw[: MAX_NAME_BYTES - 9].decode(errors='ignore')}~{_hash(name)}"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]
