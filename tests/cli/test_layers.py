"""`--schedule layer` and combined levels, from checkpoint to export."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import nestify as package
from tests.cli.driver import QUICK, nestify, stored_recipe

SHORT = (
    *("--epochs", "1", "--batch-size", "16", "--max-train", "32", "--max-val", "20"),
    *("--set", "train.eval_before=false"),
)
KWARGS = {"img_size": 32, "patch_size": 8, "depth": 4}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Command line that compresses a transformer of four blocks with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=10, **KWARGS).state_dict(), path)
    kwargs = "model.kwargs={img_size=32, patch_size=8, depth=4}"
    return "compress", "digits", "--set", "model.name=test_vit", "--checkpoint", str(path), "--set", kwargs


@pytest.fixture(scope="module")
def shallow_file(vit: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shallow") / "shallow.nested.safetensors"
    done = nestify(*vit, "--schedule", "layer", "--levels", "0.5,0.75,1", *SHORT, "-o", path)
    assert done.code == 0, done.err
    return path


def test_shallower_levels_are_really_smaller(shallow_file: Path) -> None:
    levels = nestify("report", shallow_file, "--json").document["levels"]
    assert [level["depth"] for level in levels] == [0.5, 0.75, 1.0]
    assert [len(level["skipped"]) for level in levels] == [2, 1, 0]
    assert set(levels[1]["skipped"]) < set(levels[0]["skipped"])
    block = 4 * 64 * 64 + 2 * 64 * 192 + (192 + 64) + (192 + 64) + 4 * 64  # including biases and norms
    parameters = [level["parameters"] for level in levels]
    assert parameters[2] - parameters[1] == block
    assert parameters[1] - parameters[0] == block
    assert levels[0]["dense_macs"] < 0.6 * levels[2]["dense_macs"]
    assert levels[0]["prefix_bytes"] < 0.65 * levels[2]["prefix_bytes"]
    head = nestify("report", shallow_file).out.splitlines()[2].split()
    assert "depth" in head
    assert "sparsity" not in head


def test_a_level_is_the_plain_model_without_the_blocks(shallow_file: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    nested = package.load(shallow_file)
    for number, skipped in enumerate(
        level["skipped"] for level in package.read_report(shallow_file).to_dict()["levels"]
    ):
        plain = timm.create_model("test_vit", num_classes=10, **KWARGS).eval()
        plain.load_state_dict(nested.network.state_dict())
        for name in skipped:
            plain.set_submodule(name, torch.nn.Identity())
        with torch.no_grad():
            expected = plain(images)
            torch.testing.assert_close(nested(images, level=number + 1), expected)
            torch.testing.assert_close(package.load(shallow_file, level=number + 1)(images), expected)


@pytest.mark.long  # test_channels.py has the same of narrower levels
def test_all_other_commands_work(shallow_file: Path, tmp_path: Path) -> None:
    assert nestify("verify", shallow_file).code == 0
    slim = tmp_path / "slim.safetensors"
    assert nestify("slice", shallow_file, "--level", "1", "-o", slim).code == 0
    assert nestify("verify", slim).code == 0
    whole = tmp_path / "whole.safetensors"
    assert nestify("slice", shallow_file, "--upgrade", slim, "-o", whole).code in (0, 2)
    sizes = []
    for number in ("1", "3"):
        out = tmp_path / f"{number}.pt2"
        exported = nestify("export", shallow_file, "--level", number, "--format", "pt2", "-o", out, "--json")
        assert exported.code == 0, exported.err
        sizes.append(exported.document["bytes"])
    assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.long
def test_blocks_may_be_ranked_by_their_loss(vit: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "ranked.nested.safetensors"
    words = (*vit, "--schedule", "layer", "--levels", "0.5,1", "--set", "schedule.rank=loss")
    done = nestify(*words, *QUICK, "-o", path)
    assert done.code == 0, done.err
    assert stored_recipe(path)["schedule"]["rank"] == "loss"
    assert len(package.read_report(path).levels[0].skipped) == 2


def test_a_budget_below_what_the_level_below_has(vit: tuple[str, ...]) -> None:
    """Only sizes that nest are tried, and named as the nearest."""
    done = nestify(*vit, "--schedule", "layer", "--levels", "0.75,macs=0.3,1", *QUICK, "--dry-run")
    assert done.code == 2
    assert "level[2].budget = macs=0.3 cannot be met within 2%" in done.message
    assert "(depth 0.75)" in done.message
    assert "--levels" in done.message


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dense.safetensors"
    kwargs = {"block_config": [1, 1], "growth_rate": 8}
    save_file(timm.create_model("densenet121", num_classes=10, **kwargs).state_dict(), path)
    words = ("--set", "model.name=densenet121", "--checkpoint", path)
    words = (*words, "--set", "model.kwargs={block_config=[1, 1], growth_rate=8}")
    done = nestify("compress", "digits", *words, "--schedule", "layer", "--levels", "0.5,1", *QUICK)
    assert done.code == 3
    assert "densenet121 has no residual blocks that can be skipped; use --schedule channel" in done.message


def test_depths_that_give_the_same_blocks() -> None:
    done = nestify("compress", "digits", "--schedule", "layer", "--levels", "0.5,1", *QUICK)
    assert done.code == 2
    assert "level[1].depth = 0.5 gives test_resnet the same blocks as level[2]" in done.message
    assert "1 block of the model can be skipped" in done.message


@pytest.mark.parametrize("levels", ["0.5,0.75,1", "macs=0.5,0.75,1", "latency=0.67,latency=0.85,1"])
def test_more_levels_than_there_are_depths(levels: str) -> None:
    done = nestify("compress", "digits", "--schedule", "layer", "--levels", levels, *QUICK)
    assert done.code == 3
    assert (
        "has 1 block that can be skipped, and every level keeps one, so no levels can differ" in done.message
    )


COMBINED = """
extends = "digits"
[model]
name = "test_vit"
checkpoint = "{checkpoint}"
kwargs = {{ img_size = 32, patch_size = 8, depth = 4 }}
[schedule]
kind = "combined"
[[level]]
width = 0.5
depth = 0.5
sparsity = 0.75
pattern = "{patterns[0]}"
[[level]]
width = 0.5
depth = 1.0
sparsity = 0.5
pattern = "{patterns[1]}"
[[level]]
width = 1.0
"""


@pytest.mark.parametrize(
    "patterns",
    [pytest.param(("unstructured", "unstructured"), marks=pytest.mark.long), ("1:4", "2:4")],
)
def test_a_level_may_be_narrower_shallower_and_sparse(
    patterns: tuple[str, str], vit: tuple[str, ...], tmp_path: Path
) -> None:
    recipe, path = tmp_path / "combined.toml", tmp_path / "combined.nested.safetensors"
    recipe.write_text(COMBINED.format(checkpoint=vit[5], patterns=patterns))
    done = nestify("compress", recipe, *SHORT, "-o", path)
    assert done.code == 0, done.err
    assert nestify("verify", path).code == 0
    levels = nestify("report", path, "--json").document["levels"]
    assert [(level["width"], level["depth"]) for level in levels] == [(0.5, 0.5), (0.5, 1), (1, 1)]
    for number, (level, share) in enumerate(zip(levels, (0.75, 0.5, 0.0), strict=True), start=1):
        plain = package.load(path, level=number)
        weights = {name: p for name, p in plain.named_parameters() if name.endswith("weight") and p.ndim >= 2}
        zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
        total = sum(map(torch.numel, weights.values()))
        assert level["sparsity"] == pytest.approx(sum(zeros.values()) / total, abs=1e-9)
        divided = [
            name
            for name, weight in weights.items()
            if patterns[0] == "unstructured" or weight.shape[1] % 4 == 0
        ]
        part = sum(zeros[name] for name in divided) / sum(weights[name].numel() for name in divided)
        assert part == pytest.approx(share, abs=1e-3)
        assert level["parameters"] == sum(parameter.numel() for parameter in plain.parameters())
        assert level["nonzero_parameters"] == level["parameters"] - sum(zeros.values())
    slim = tmp_path / "slim.safetensors"
    assert nestify("slice", path, "--level", "2", "-o", slim).code == 0
    assert nestify("verify", slim).code == 0
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(package.load(slim)(images, level=1), package.load(path)(images, level=1))


def test_levels_of_one_schedule_do_not_take_the_axes_of_another(vit: tuple[str, ...]) -> None:
    done = nestify(*vit, "--schedule", "layer", "--set", "level[1].width=0.5")
    assert done.code == 2
    assert 'level[1].width = 0.5 needs schedule.kind = "channel" or "combined"' in done.err
