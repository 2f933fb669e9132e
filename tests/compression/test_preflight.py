"""All problems of a command line are found at once, before images or models are opened."""

from pathlib import Path

import pytest

from nestify.errors import CheckpointError, DataError, NestifyError, OutputError, RecipeError, joined
from tests.cli.driver import nestify

WRONG = {
    "resnett50": ("resnett50",),
    "nosuch": ("--data", "nosuch"),
    "sgdd": ("--opt", "sgdd"),
    "x.csv": ("--hierarchy", "x.csv"),
    "nowhere": ("-o", "nowhere/x.safetensors"),
    "vit_smol": ("--teacher", "vit_smol"),
    "a.pth": ("--checkpoint", "a.pth"),
    "xpu:7": ("--device", "xpu:7"),
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_all_problems_are_told_at_once_the_model_first(dry: tuple[str, ...]) -> None:
    words = [word for option in WRONG.values() for word in option]
    done = nestify("compress", *words, *dry)
    assert done.code == 2
    lines = done.err.splitlines()
    assert len(lines) == len(WRONG)
    assert all(any(value in line for line in lines) for value in WRONG)
    assert "resnet50" in lines[0]
    assert not done.out


def test_problems_of_the_recipe_hide_no_others() -> None:
    done = nestify("compress", "resnett50", "--data", "nosuch", "--levels", "2,0", "--epochs", "-1")
    assert done.code == 2
    assert len(done.err.splitlines()) == 4
    images = nestify("compress", "resnet50", "--data", "nosuch", "--levels", "2,0")
    assert images.code == 2
    assert len(images.err.splitlines()) == 2
    missing = nestify("compress", "resnett50")
    assert missing.code == 2
    assert "data.path" in missing.err
    assert "resnett50" in missing.err
    assert "unknown" not in missing.err


def test_a_problem_alone_keeps_its_exit_code() -> None:
    assert nestify("compress", "resnet18", "--data", "nosuch").code == 3
    assert nestify("compress", "resnett18", "--data", ".").code == 2


def test_joined_errors() -> None:
    first, second, third = DataError("a"), OutputError("b"), RecipeError(["c", "d"])
    assert joined([first]) is first
    assert (str(joined([first, second])), joined([first, second]).exit_code) == ("a\nb", 3)
    assert str(joined([first, second, third])) == "a\nb\nc\nd"
    assert joined([first, second, third]).exit_code == RecipeError.exit_code
    assert isinstance(joined([CheckpointError("x"), first]), NestifyError)
