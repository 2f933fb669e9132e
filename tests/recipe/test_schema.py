"""The JSON Schema of recipes: it accepts what the loader accepts, and refuses what it refuses."""

import json
import math
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from nestify.errors import RecipeError
from nestify.recipe.problems import section_of
from nestify.recipe.recipe import Recipe, load_recipe
from nestify.recipe.schema import recipe_schema, schema_text
from nestify.recipe.sources import builtin_recipes, recipe_text

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "nestify" / "recipe" / "recipe.schema.json"
NEEDED: dict[str, Any] = {"model": {"name": "resnet18"}, "data": {"path": "photos"}}
LEVELS = [{"sparsity": 0.5}, {"sparsity": 0.0}]


def accepts(table: object) -> bool:
    """Return whether an independent validator accepts a recipe under the schema."""
    return bool(validator().is_valid(table))


@cache
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    return jsonschema.Draft202012Validator(recipe_schema())


def options() -> list[tuple[str, str]]:
    """Return the section and the name of every option in a section."""
    found = []
    for name, field in Recipe.model_fields.items():
        if (section := section_of(field)) is not None:
            found += [(name, option) for option in section.model_fields]
    return found


def table_with(section: str, option: str, value: object) -> dict[str, Any]:
    if section == "level":
        return {**NEEDED, "level": [{**LEVELS[0], option: value}, LEVELS[1]]}
    return {**NEEDED, section: {**NEEDED.get(section, {}), option: value}}


def is_read(table: dict[str, Any]) -> bool:
    """Return whether the loader accepts each value by itself, and each level's share."""
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError:
        return False
    return all(
        (level.sparsity is None or 0 <= level.sparsity < 1)
        and (level.width is None or 0 < level.width <= 1)
        and (level.depth is None or 0 < level.depth <= 1)
        for level in recipe.level
    )


def test_the_published_schema_is_generated() -> None:
    assert PUBLISHED.read_text() == schema_text(), "write it again: see the docstring of recipe.schema"


def test_the_wheel_has_the_schema() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert PUBLISHED in {path for each in patterns["nestify"] for path in (ROOT / "nestify").glob(each)}


def test_it_is_a_schema_with_every_key() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)
    assert {*Recipe.model_fields, "extends", "matrix"} == set(schema["properties"])
    described = [field for part in schema["$defs"].values() for field in part["properties"].values()]
    assert all(field["description"] for field in described)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_the_example_recipes_fit(path: Path) -> None:
    assert accepts(tomllib.loads(path.read_text()))


@pytest.mark.parametrize("name", builtin_recipes())
def test_the_built_in_recipes_fit(name: str) -> None:
    assert accepts(tomllib.loads(recipe_text(name)))
    assert accepts(json.loads(json.dumps(load_recipe(name).to_dict())))


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("train", "epoch", 3),
        ("train", "epochs", "3"),
        ("train", "lr", 0),
        ("train", "bn", "shared"),
        ("train", "log", ["csv", "xml"]),
        ("train", "teacher_checkpoint", "weights.zip"),
        ("model", "input_size", [224]),
        ("model", "checkpoint", 3),
        ("augment", "scale", [0.5, 1.5]),
        ("augment", "auto_augment", "random"),
        ("schedule", "pattern", "2:4"),
        ("level", "sparsity", 1.0),
        ("level", "budget", "cost=3"),
        ("level", "pattern", "many"),
        ("gates", "min_top1", 0.7),
        ("gates", "max_bytes", 0),
        ("finetune", "save", "weights.pth"),
    ],
)
def test_mistakes_are_marked(section: str, option: str, value: object) -> None:
    table = table_with(section, option, value)
    assert not accepts(table)
    assert not is_read(table)


def test_extends_a_matrix_and_none_fit() -> None:
    table = {"extends": "digits", "matrix": {"train.lr": [0.1, 0.2], "train": {"seed": [1]}}}
    assert accepts({**table, "model": {"checkpoint": "none", "input_size": "none", "new_head": "none"}})
    assert not accepts({"extends": 3})
    assert not accepts({"matrix": {"train.lr": 0.1}})
    assert not accepts({"level": [{"sparsity": 0.5}]})
    assert not accepts({"device": "GPU 1"})


WORDS = (
    "none",
    "auto",
    "cpu",
    "csv",
    "2:4",
    "4x1",
    "macs=0.5",
    "x.pth",
    "x.safetensors",
    "rand-m9",
    "",
    "4MB",
)
NUMBERS = st.integers(-3, 300) | st.floats(-2, 200, allow_nan=False).filter(lambda x: x % 1)
PLAIN = st.booleans() | NUMBERS | st.sampled_from(WORDS) | st.text("ab.:=", max_size=4)
VALUES = (
    PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.sampled_from(("a", "level")), PLAIN, max_size=1)
)


@settings(max_examples=400, deadline=None)
@given(place=st.sampled_from(options()), value=VALUES)
def test_what_the_loader_reads_the_schema_accepts(place: tuple[str, str], value: object) -> None:
    table = table_with(*place, value)
    if is_read(table):
        assert accepts(table), (place, value)


SPANS = {("model", "kwargs"), ("augment", "scale"), ("augment", "ratio")}
"""Options whose validators compare several values, which JSON Schema cannot say."""


@settings(max_examples=400, deadline=None)
@given(place=st.sampled_from(sorted({*options()} - SPANS)), value=VALUES)
def test_what_the_schema_accepts_the_loader_reads(place: tuple[str, str], value: object) -> None:
    table = table_with(*place, value)
    is_amount = place[0] == "gates" and isinstance(value, str)  # the units of each quantity
    if accepts(table) and not is_amount:
        assert is_read(table), (place, value)


@pytest.mark.parametrize("value", [3.0, math.inf, 1e101])
def test_what_the_schema_does_not_know(value: float) -> None:
    """JSON Schema counts 3.0 as a whole number; TOML's inf and numbers above 1e100 are left to the loader."""
    table = table_with("train", "batch_size" if value == 3 else "epochs", value)
    assert accepts(table)
    assert not is_read(table)


def test_every_optional_key_takes_none() -> None:
    for section, option in options():
        model: Any = section_of(Recipe.model_fields[section])
        assert issubclass(model, BaseModel)
        if model.model_fields[option].default is None:
            assert accepts(table_with(section, option, "none")), (section, option)
            assert is_read(table_with(section, option, "none"))


def test_a_models_name_is_no_recipe() -> None:
    with pytest.raises(RecipeError, match=r"resnet18: .*digits"):
        recipe_text("resnet18")
