"""`--schedule channel`: narrower levels, end to end."""

import json
from pathlib import Path

import pytest
import torch

import nestify as package
from tests.cli.driver import CHECKPOINT, QUICK, TWO_STEPS, nestify, stored_recipe

WIDTHS = ("--schedule", "channel", "--levels", "0.25,0.5,1")


@pytest.fixture(scope="module")
def narrow_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("narrow") / "narrow.nested.safetensors"
    done = nestify("compress", "digits", *WIDTHS, *QUICK, "-o", path)
    assert done.code == 0, done.err
    return path


def test_narrower_levels_are_really_smaller(narrow_file: Path) -> None:
    done = nestify("report", narrow_file, "--json")
    levels = done.document["levels"]
    assert [level["width"] for level in levels] == [0.25, 0.5, 1.0]
    assert [level["sparsity"] for level in levels] == [0, 0, 0]
    # Four stages of 32, 48, 48 and 96 channels: their products shrink with the square of the width.
    macs = [level["dense_macs"] for level in levels]
    assert macs[0] < 0.15 * macs[2]
    assert macs[1] < 0.3 * macs[2]
    assert macs == [level["effective_macs"] for level in levels]
    for number, level in enumerate(levels, start=1):
        plain = package.load(narrow_file, level=number)
        assert level["parameters"] == sum(parameter.numel() for parameter in plain.parameters())
    assert levels[0]["prefix_bytes"] < 0.2 * levels[2]["prefix_bytes"]


def test_the_table_has_widths_and_no_sparsities(narrow_file: Path) -> None:
    head = nestify("report", narrow_file).out.splitlines()[2].split()
    assert "width" in head
    assert "sparsity" not in head


def test_the_full_level_is_the_pretrained_model(narrow_file: Path) -> None:
    """Its channels are in another order, but its logits are the same."""
    original = package.read_report(narrow_file).original["top1"]
    done = nestify("eval", narrow_file, "--data", "embedded/digits", "--max-images", "100", "--json")
    assert done.document["levels"][2]["top1"] == original


def test_all_other_commands_work(narrow_file: Path, tmp_path: Path) -> None:
    assert nestify("verify", narrow_file).code == 0
    slim = tmp_path / "slim.safetensors"
    assert nestify("slice", narrow_file, "--level", "1", "-o", slim).code == 0
    assert nestify("verify", slim).code == 0
    sizes = []
    for number in (1, 3):
        exported = nestify(
            "export",
            slim if number == 1 else narrow_file,
            "--level",
            str(number),
            "--format",
            "pt2",
            "--json",
        )
        assert exported.code == 0, exported.err
        sizes.append(exported.document["bytes"])
    assert sizes[0] < 0.4 * sizes[1]
    refused = nestify("export", narrow_file, "--level", "1", "--format", "timm")
    assert refused.code == 3
    assert "export it as onnx or pt2" in refused.message


@pytest.mark.long
def test_training_moves_the_shared_weights(tmp_path: Path) -> None:
    path = tmp_path / "trained.nested.safetensors"
    done = nestify("compress", "digits", *WIDTHS, *TWO_STEPS, "-o", path)
    assert done.code == 0, done.err
    assert nestify("verify", path).code == 0
    model = package.load(path)
    core = model.projection(1)
    weight = core["conv1.0.weight"]
    assert torch.equal(weight, model.network.state_dict()["conv1.0.weight"][: weight.shape[0]])


@pytest.mark.long
def test_the_same_seed_gives_the_same_bytes(narrow_file: Path, tmp_path: Path) -> None:
    again = tmp_path / "narrow.nested.safetensors"
    assert nestify("compress", "digits", *WIDTHS, *QUICK, "-o", again).code == 0
    assert again.read_bytes() == narrow_file.read_bytes()


@pytest.mark.long
def test_a_recipe_gives_the_same_levels(narrow_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "narrow.toml"
    recipe.write_text(
        'extends = "digits"\n[schedule]\nkind = "channel"\n'
        "[[level]]\nwidth = 0.25\n[[level]]\nwidth = 0.5\n[[level]]\nwidth = 1.0\n"
    )
    plans = [
        nestify("compress", *words, *QUICK, "--dry-run", "--json").document
        for words in (["digits", *WIDTHS], [recipe])
    ]
    levels = [[level["dense_macs"] for level in plan["levels"]] for plan in plans]
    assert levels[0] == levels[1]
    assert stored_recipe(narrow_file)["schedule"]["kind"] == "channel"


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ("0.5,0.25,1", "level[2].width = 0.25 is not above level[1].width = 0.5"),
        ("0.5,1.5", "level[2].width = 1.5 is not in (0, 1]"),
        ("0.25,0.5", "level[2].width = 0.5 is not 1; the full level has all channels"),
        ("0,1", "level[1].width = 0.0 is not in (0, 1]"),
        ("1:4,2:4,0.5", 'level[1].sparsity = 0.75 needs schedule.kind = "weight" or "combined"'),
    ],
)
def test_widths_that_do_not_nest(levels: str, expected: str) -> None:
    done = nestify("compress", "digits", "--schedule", "channel", "--levels", levels)
    assert done.code == 2
    assert expected in done.err


def test_the_default_widths(tmp_path: Path) -> None:
    words = ("test_resnet", "--checkpoint", CHECKPOINT, "--data", "embedded/digits")
    done = nestify("compress", *words, "--schedule", "channel", *QUICK, "--dry-run", "--json")
    assert done.code == 0, done.err
    widths = [level["width"] for level in json.loads(done.out)["levels"]]
    assert widths == [0.25, 0.5, 1.0]


def test_levels_that_would_be_the_same(tmp_path: Path) -> None:
    done = nestify("compress", "digits", "--schedule", "channel", "--levels", "0.99,1", *QUICK)
    assert done.code == 2
    assert (
        "level[1].width = 0.99 gives test_resnet the same channels as level[2]; choose widths" in done.message
    )


def test_a_width_needs_the_schedule(tmp_path: Path) -> None:
    recipe = tmp_path / "a.toml"
    recipe.write_text('extends = "digits"\n[[level]]\nwidth = 0.5\n[[level]]\nwidth = 1.0\n')
    done = nestify("compress", recipe)
    assert done.code == 2
    assert 'level[1].width = 0.5 needs schedule.kind = "channel"' in done.err
