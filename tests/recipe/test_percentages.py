"""Percentages instead of shares, and shares instead of percentages: the likely value is suggested."""

import pytest

from nestify.errors import RecipeError
from nestify.recipe.flags import name_flags
from nestify.recipe.recipe import Recipe, load_recipe


def problems(options: dict[str, object]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe("resnet18", {"data.path": "photos"} | options)
    return caught.value.problems


@pytest.mark.parametrize(
    ("kind", "levels", "meant"),
    [
        ("weight", "95,80,0", "0.95,0.8,0"),
        ("weight", "95%,80%,0%", "0.95,0.8,0"),
        ("weight", "97.5 %, 80 %, 0", "0.975,0.8,0"),
        ("weight", "2:4,50%,0", "2:4,0.5,0"),
        ("weight", "macs=0.2,60,0", "macs=0.2,0.6,0"),
        ("weight", [95, 80, 0], "0.95,0.8,0"),
        ("channel", "25,50,100", "0.25,0.5,1"),
        ("channel", "25%,50%,100%", "0.25,0.5,1"),
        ("layer", "50,75,100", "0.5,0.75,1"),
        ("layer", "50%,100%", "0.5,1"),
    ],
)
def test_levels_in_percent(kind: str, levels: object, meant: str) -> None:
    [problem] = problems({"schedule.kind": kind, "levels": levels})
    assert problem.endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize("levels", ["1.5,0", "120,0", "95,0.5,0", "100,50,0", "1,2,3"])
def test_levels_that_are_wrong_otherwise(levels: str) -> None:
    assert all(problem.startswith("level[") for problem in problems({"levels": levels}))


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("data.holdout", 10, "0.1"),
        ("data.holdout", "10%", "0.1"),
        ("data.calibrate", 5.0, "0.05"),
        ("train.distill", "50 %", "0.5"),
        ("train.momentum", 90, "0.9"),
        ("augment.smoothing", "10%", "0.1"),
        ("level[1].sparsity", 95, "0.95"),
        ("gates.min_top1", 0.7, "70"),
        ("gates.min_top1", "70%", "70"),
        ("gates.max_drop", "2%", "2"),
        ("gates.max_regression", "0.5%", "0.5"),
        ("gates.level.level1.min_top1", 0.7, "70"),
    ],
)
def test_a_share_or_a_percentage(key: str, value: object, meant: str) -> None:
    told = problems({"levels": "0.9,0", "gates.baseline": "a.json", key: value})
    assert len(told) == 1
    assert told[0].startswith(f"{key} = ")
    assert told[0].endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize(("key", "value"), [("train.lr", 10), ("seed", 70), ("gates.max_drop", 0.5)])
def test_numbers_of_other_options_are_taken(key: str, value: object) -> None:
    load_recipe("resnet18", {"data.path": "photos", key: value})


@pytest.mark.parametrize("key", ["gates.max_macs", "gates.max_bytes", "gates.max_params"])
@pytest.mark.parametrize("value", [0.5, "0.5", "50%"])
def test_a_share_is_no_amount(key: str, value: object) -> None:
    [problem] = problems({key: value})
    assert problem.startswith(f"{key} = ")
    assert "; give " in problem


@pytest.mark.parametrize("quantity", ["macs", "params", "bytes"])
def test_a_budget_in_percent(quantity: str) -> None:
    [problem] = problems({"levels": f"{quantity}=25%,1"})
    assert problem.endswith(f"; did you mean {quantity}=0.25?")


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("data.path is not given", " (flag: --data)"),
        ("a.toml: output = x is a folder", " (flag: --output)"),
        ("model.new_head = true needs finetune.epochs", " (flags: --new-head, --finetune-epochs)"),
        ("did you mean train.epochs?", " (flag: --epochs)"),
        ("level[2].sparsity = 0.8", " (flag: --levels)"),
        ('levels has "x", not a sparsity', " (flag: --levels)"),
        ("schedule.score = 1", " (flag: --score)"),
        ("use a smaller --lr (train.lr)", ""),
        ("repeat it with --criterion, see schedule.score", ""),
        ("train.clip_grad may help", ""),
        ("the output is new, and the device too", ""),
        ("runs/train.lr/a.toml: there is no such file", ""),
        ("train.lr.x = 1", ""),
    ],
)
def test_messages_name_flags(text: str, flags: str) -> None:
    assert name_flags(Recipe, text) == text + flags
    assert name_flags(Recipe, f"first\n{text}") == f"first\n{text}{flags}"
