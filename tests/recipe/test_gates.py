"""[gates] of a recipe, and of a file of their own: what is right, and what is refused."""

from pathlib import Path

import pytest

from nestify.errors import RecipeError
from nestify.recipe.gates import LevelGates, load_gates
from nestify.recipe.recipe import load_recipe


def test_gates_of_a_recipe_and_of_a_file_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[model]\nname = 'resnet18'\n[data]\npath = 'x'\n"
        "[gates]\nmax_drop = 2\nbaseline = 'old.json'\nmax_regression = 0.5\n"
        "[gates.level.level1]\nmax_bytes = '4MiB'\nmax_drop = 9.5\n"
    )
    gates = load_recipe(str(path)).gates
    assert gates == load_gates(str(path))
    assert gates.baseline == str(tmp_path / "old.json")
    assert gates.for_level(1, "level1") == LevelGates(max_drop=9.5, max_regression=0.5, max_bytes="4MiB")
    assert gates.for_level(2, "level2") == LevelGates(max_drop=2, max_regression=0.5)
    assert gates.given()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"gates.min_top1": 101},
            "gates.min_top1 = 101 is not in [0, 100] (minimum top-1",
        ),
        (
            {"gates.level.core.min_top1": "x"},
            'gates.level.core.min_top1 = "x" is not a number (minimum top-1',
        ),
        ({"gates.level.core.min_top": 1}, "unknown key gates.level.core.min_top; did you mean"),
        (
            {"gates.max_bytes": "4 apples"},
            'gates.max_bytes = "4 apples" is not an amount of bytes',
        ),
        ({"gates.max_macs": 0}, "gates.max_macs = 0 is not an amount of macs above 0"),
        ({"gates.level.phone.min_top1": 1}, "gates.level.phone is no level of the recipe; its levels are"),
        ({"gates.max_regression": 1}, "gates.max_regression needs gates.baseline"),
        ({"gates.min_top2": 1}, "unknown key gates.min_top2; did you mean gates.min_top1?"),
    ],
)
def test_what_is_wrong_is_told(options: dict[str, object], told: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("resnet18", {"data.path": "x", **options})
    assert error.value.problems[0].startswith(told)


def test_a_file_without_gates_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gates.toml"
    path.write_text("min_top1 = 3\n")
    with pytest.raises(RecipeError, match=r"gates.toml: this file has no \[gates\]"):
        load_gates(str(path))
    path.write_text("[gates]\nmin_top1 = 'x'\nmax_drop = -1\n")
    with pytest.raises(RecipeError) as error:
        load_gates(str(path))
    assert len(error.value.problems) == 2
    path.write_text("[gates]\nmax_regression = 1\n")
    with pytest.raises(RecipeError, match=r"needs gates\.baseline"):
        load_gates(str(path))
    assert load_gates(str(path), compared=True).max_regression == 1
