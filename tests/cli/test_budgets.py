"""Budgets: a level meets its budget, or the command reports the nearest cost."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nestify as package
from nestify.recipe.amounts import parse_budget
from tests.cli.driver import QUICK, UNTRAINED, nestify

SHORT = (
    *("--epochs", "0.1", "--batch-size", "32", "--max-train", "64", "--max-val", "20"),
    *("--set", "train.eval_before=false", "--set", "train.recalibrate_batches=2"),
)


def executed_macs(model: torch.nn.Module) -> int:
    """Return the MACs of one digit as torch's FLOP counter counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("kind", "budgets", "options"),
    [
        pytest.param("channel", ["macs=0.25", "macs=2M"], UNTRAINED, marks=pytest.mark.long),
        pytest.param("channel", ["params=70K", "params=0.5"], UNTRAINED, marks=pytest.mark.long),
        pytest.param("channel", ["bytes=300KB"], SHORT, marks=pytest.mark.long),
        pytest.param("weight", ["params=40K", "params=0.5"], SHORT, marks=pytest.mark.long),
        ("weight", ["bytes=200KB"], SHORT),
        pytest.param("weight", ["bytes=200KB", "bytes=1MB"], SHORT, marks=pytest.mark.long),
        pytest.param("weight", ["macs=0.25", "macs=0.5"], SHORT, marks=pytest.mark.long),
        pytest.param(
            "weight", ["macs=0.25", "macs=0.5"], (*UNTRAINED, "--score", "per_mac"), marks=pytest.mark.long
        ),
    ],
)
def test_a_level_meets_its_budget(
    kind: str, budgets: list[str], options: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    words = ("digits", "--schedule", kind, "--levels", ",".join([*budgets, "1"]))
    done = nestify("compress", *words, *options, "-o", path)
    assert done.code == 0, done.err
    levels = package.read_report(path).levels
    full = package.load(path, level=len(levels))
    for number, text in enumerate(budgets, start=1):
        budget = parse_budget(text)
        plain = package.load(path, level=number)
        if budget.quantity == "bytes":
            cost, whole = levels[number - 1].prefix_bytes, path.stat().st_size
        elif budget.quantity == "params":
            zeros = sum(int((p == 0).sum()) for p in plain.parameters() if p.ndim >= 2)
            cost = sum(p.numel() for p in plain.parameters()) - zeros
            whole = sum(p.numel() for p in full.parameters())
        elif kind == "channel":
            cost, whole = executed_macs(plain), executed_macs(full)
        else:
            cost, whole = levels[number - 1].effective_macs or 0, executed_macs(full)
        assert cost == pytest.approx(budget.target(whole), rel=0.02)


@pytest.mark.long
def test_a_level_of_a_recipe_meets_its_budget(tmp_path: Path) -> None:
    recipe, path = tmp_path / "a.toml", tmp_path / "a.safetensors"
    recipe.write_text(
        'extends = "digits"\n[schedule]\nkind = "combined"\n'
        '[[level]]\nbudget = "macs=0.2"\nsparsity = 0.5\n[[level]]\nwidth = 1.0\n'
    )
    done = nestify("compress", recipe, *QUICK, "-o", path)
    assert done.code == 0, done.err
    core, full = package.read_report(path).levels
    assert core.sparsity == pytest.approx(0.5, abs=1e-3)
    assert 0 < core.width < 1
    assert (core.effective_macs or 0) / (full.effective_macs or 1) == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "levels", "expected"),
    [
        (
            "layer",
            "macs=0.5,1",
            "level[1].budget = macs=0.5 cannot be met within 2% by test_resnet; choose the nearest",
        ),
        ("channel", "params=10,1", "level[1].budget = params=10 cannot be met within 2% by test_resnet"),
        ("weight", "params=0.5,params=0.25,1", "level[2].budget = params=0.25 is not above level[1].budget"),
        ("weight", "macs=half,1", 'level[1].budget = "macs=half" is not understood; give macs=0.25'),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(kind: str, levels: str, expected: str) -> None:
    done = nestify("compress", "digits", "--schedule", kind, "--levels", levels, *QUICK, "--dry-run")
    assert done.code == 2
    assert expected in done.err


def test_a_budget_and_the_size_that_it_decides_are_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "a.toml"
    recipe.write_text(
        'extends = "digits"\n[schedule]\nkind = "channel"\n'
        '[[level]]\nbudget = "macs=0.2"\nwidth = 0.5\n[[level]]\nwidth = 1.0\n'
    )
    done = nestify("compress", recipe)
    assert done.code == 2
    assert "level[1].budget = macs=0.2 is to decide level[1].width; give one of the two" in done.err
