"""A recipe written as TOML is read again as the same recipe."""

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestify.errors import RecipeError
from nestify.recipe.recipe import Recipe, load_recipe
from nestify.recipe.sources import builtin_recipes
from nestify.recipe.toml import recipe_toml

EXAMPLES = Path(__file__).parents[2] / "recipes"
COMPLETE = sorted(str(path) for path in EXAMPLES.glob("*.toml") if path.stem != "imagenet")


def read_again(recipe: Recipe, folder: Path) -> Recipe:
    path = folder / "again.toml"
    path.write_text(recipe_toml(recipe), encoding="utf-8")
    return load_recipe(path)


@pytest.mark.parametrize("source", [*builtin_recipes(), *COMPLETE], ids=lambda source: Path(source).stem)
def test_it_is_read_again_as_the_same_recipe(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(source)
    assert read_again(recipe, tmp_path) == recipe


def test_it_has_every_key_and_its_default() -> None:
    table = tomllib.loads(recipe_toml(load_recipe("resnet18", {"data.path": "photos"})))
    assert table["train"]["epochs"] == 10
    assert table["data"]["class_names"] == "none"
    assert [level["sparsity"] for level in table["level"]] == [0.95, 0.8, 0.0]
    for name, field in Recipe.model_fields.items():
        if name not in ("level", "output", "dtype", "seed", "device"):
            assert set(table[name]) == set(field.annotation.model_fields)  # type: ignore[union-attr]


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(min_size=1).filter(lambda text: text.strip() not in ("", "none")),
    lr=st.floats(1e-300, 1e99),
    kwargs=st.dictionaries(
        st.text(max_size=5).filter(lambda key: key not in ("pretrained", "checkpoint_path")),
        st.booleans()
        | st.integers().filter(lambda n: abs(n) < 2**60)
        | st.text(max_size=5)
        | st.lists(st.integers(0, 9) | st.text(max_size=3)),
        max_size=3,
    ),
)
def test_any_text_and_number_survives(text: str, lr: float, kwargs: dict[str, object]) -> None:
    table = {
        "model": {"name": "resnet18", "kwargs": kwargs},
        "data": {"path": "photos", "train_split": text},
        "train": {"lr": lr},
        "gates": {"level": {text: {"max_macs": "5M"}}},
    }
    recipe = Recipe.model_validate(table)
    assert Recipe.model_validate(tomllib.loads(recipe_toml(recipe))) == recipe


def test_a_null_in_kwargs_has_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    table = {"model": {"name": "resnet18", "kwargs": {"drop": None}}, "data": {"path": "photos"}}
    path.write_text(json.dumps(table))
    with pytest.raises(RecipeError, match=r"model\.kwargs\.drop .*--json"):
        recipe_toml(load_recipe(path))
