"""A recipe's `freeze = true`: lower levels are trained alone, and higher levels around them."""

from pathlib import Path

import pytest

from nestify.file.reader import open_nested_file
from tests.cli.driver import CHECKPOINT, DIGITS, events, interrupt, nestify, stored_recipe

FEW = (
    *("--max-train", "48", "--max-val", "20", "--batch-size", "16", "--epochs", "2", "--workers", "0"),
    *("--set", "train.recalibrate_batches=2", "--set", "train.eval_before=false"),
)
OUTPUT = Path("mine.nested.safetensors")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "frozen.toml"
    path.write_text(
        'extends = "digits"\n[[level]]\nsparsity = 0.95\nfreeze = true\n'
        "[[level]]\nsparsity = 0.8\n[[level]]\nsparsity = 0.0\n"
    )
    return str(path)


def hashes(path: str | Path) -> list[str]:
    return [level.sha256 for level in open_nested_file(path).manifest.levels]


@pytest.mark.long
def test_a_frozen_level_is_the_level_trained_alone_and_extended(recipe: str) -> None:
    assert nestify("compress", recipe, *FEW, "-o", OUTPUT).code == 0
    only_core = ("--levels", "0.95,0", "--set", "level[2].weight=0")
    assert nestify("compress", "digits", *FEW, *only_core, "-o", "alone.safetensors").code == 0
    frozen = hashes(OUTPUT)
    assert frozen[0] == hashes("alone.safetensors")[0]

    assert nestify("slice", "alone.safetensors", "--level", "1", "-o", "core.safetensors").code == 0
    original = ("--checkpoint", CHECKPOINT, "--data", DIGITS)
    done = nestify("extend", "core.safetensors", "--levels", "0.8,0", *original, "-o", "later.safetensors")
    assert done.code == 0, done.err
    assert hashes("later.safetensors") == frozen


def test_recipe_log_and_progress(recipe: str) -> None:
    done = nestify("compress", recipe, *FEW, "-o", OUTPUT, "--json")
    assert done.code == 0, done.err
    levels = stored_recipe(OUTPUT)["level"]
    assert [level.get("freeze") for level in levels] == [True, None, None]
    trained = events(Path("mine.metrics.jsonl"), "train")
    assert [event["epoch"] for event in trained] == [1, 2, 3, 4]
    assert [event["step"] for event in trained] == [3, 6, 9, 12]
    assert {event["total_steps"] for event in trained} == {12}
    assert [[loss is None for loss in event["losses"]] for event in trained] == [
        [False, True, True],
        [False, True, True],
        [True, False, False],
        [True, False, False],
    ]
    for event in trained:
        assert [top1 is None for top1 in event["top1"]] == [loss is None for loss in event["losses"]]
    assert "12 of nested training" in done.err


@pytest.mark.long  # training/test_resume.py interrupts fine-tuning and training
def test_a_run_that_is_interrupted_in_each_stage_resumes_there(recipe: str) -> None:
    command = ("compress", recipe, *FEW, "-o", OUTPUT)
    assert nestify(*command).code == 0
    whole = OUTPUT.read_bytes()
    OUTPUT.unlink()
    assert interrupt(5, *command).code == 130  # in the second epoch of the first stage
    second = interrupt(5, *command, "--resume")  # in the second epoch of the second stage
    assert second.code == 130
    assert "resuming at step 5 of 12 of the training" in second.err
    again = nestify(*command, "--resume")
    assert again.code == 0, again.err
    assert "resuming at step 10 of 12 of the training" in again.err
    assert OUTPUT.read_bytes() == whole


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["level[3].freeze=true"], ["level[3].freeze", "leave it out"]),
        (["level[1].weight=0"], ["level[1].freeze", "weight = 0"]),
        (["level[2].weight=0", "level[3].weight=0"], ["level[1].freeze", "weight = 0"]),
        (["level[1].freeze=1"], ["level[1].freeze"]),
    ],
)
def test_refusals(settings: list[str], said: list[str], recipe: str) -> None:
    options = [word for setting in settings for word in ("--set", setting)]
    done = nestify("compress", recipe, *options)
    assert done.code == 2
    assert all(text in done.message for text in said), done.message


def test_budgets_of_weights_are_refused() -> None:
    done = nestify("compress", "digits", "--levels", "macs=0.3,0", "--set", "level[1].freeze=true")
    assert done.code == 2
    assert "level[1].budget" in done.message
    assert "give sparsities" in done.message
