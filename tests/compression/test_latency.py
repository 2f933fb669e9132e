"""Budgets of latency over a made-up table of layer times."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import nestify as package
from nestify.compression import latency
from nestify.engine.layer_times import LayerTime, LayerTimes
from nestify.engine.library import load_library
from nestify.errors import BudgetError, NestifyError, RecipeError
from nestify.recipe.amounts import Budget
from nestify.recipe.levels import Level
from nestify.training.observer import Observer
from tests.cli.driver import nestify

FEW = {"data.max_train": 64, "data.max_val": 32, "train.batch_size": 32}


def even_times(network, spec) -> LayerTimes:
    """Every weight takes 1 second; packed, a layer takes half of that and its density."""
    sizes = {name: network.get_parameter(name).numel() for name in spec.maskable}
    layers = {name: LayerTime(float(n), 0.1 * n, 0.9 * n) for name, n in sizes.items()}
    return LayerTimes(layers, 0.0, 0.0)


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestify.engine.profile.layer_times", even_times)
    monkeypatch.setattr("nestify.compression.preflight.load_library", lambda: None)


@pytest.mark.parametrize("score", ["uniform", "lamp", "per_mac"])
def test_levels_keep_what_their_predicted_time_allows(score: str) -> None:
    options = {**FEW, "levels": "latency=0.19,latency=0.4,1", "schedule.score": score}
    plan = package.plan("digits", options)
    sparsities = [level.level.sparsity for level in plan.levels]
    assert sparsities == sorted(sparsities, reverse=True)
    for planned, budget in zip(plan.levels, (0.19, 0.4, 1.0), strict=True):
        seconds = sum(
            0.1 * layer.weights + 0.9 * layer.kept if layer.kept <= 0.45 * layer.weights else layer.weights
            for layer in planned.cost.layers
        )
        predicted = seconds / sum(layer.weights for layer in planned.cost.layers)
        assert planned.latency == pytest.approx(predicted, rel=1e-6)
        assert predicted == pytest.approx(budget, rel=0.02)
    if score == "uniform":  # 0.1 + 0.9 * density
        assert sparsities == pytest.approx([0.9, 2 / 3, 0], abs=0.01)


def test_a_share_that_no_sparsity_reaches_is_refused_with_the_nearest() -> None:
    options = {**FEW, "levels": "latency=0.05,1", "schedule.score": "uniform"}
    with pytest.raises(RecipeError, match=r"latency=0.05 cannot be met .* 0.1\d* \(sparsity 0.99"):
        package.plan("digits", options)


@pytest.mark.parametrize("kind", ["channel", "layer"])
def test_other_schedules_are_referred_to_macs(kind: str) -> None:
    done = nestify("compress", "digits", "--schedule", kind, "--levels", "latency=0.3,1", "--dry-run")
    assert done.code == 2
    assert "level[1].budget = latency=0.3 needs schedule.kind" in done.err
    assert "macs=0.3" in done.err


LEVELS = [Level("a", 0.9, budget=Budget("latency", 0.3, True)), Level("b", 0.5), Level("c", 0.0)]


def measured(over_full: float):
    """Return a function like `bench` that measures the levels of `LEVELS`."""
    shares = {1: over_full, 2: 0.9, 3: 1.0}
    levels = [SimpleNamespace(level=k, over_full=share) for k, share in shares.items()]
    return lambda path, **options: SimpleNamespace(measurements=[SimpleNamespace(levels=levels)])


@pytest.mark.parametrize(("over_full", "missed"), [(0.1, False), (0.329, False), (0.331, True)])
def test_a_level_may_be_a_tenth_slower_than_its_budget(
    over_full: float, missed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "bench", measured(over_full))
    messages = latency.missed_latencies(Path("a"), LEVELS, Observer())
    assert [message.partition(" was missed")[0] for message in messages] == [
        "level[1].budget = latency=0.3"
    ] * missed


def test_nothing_is_measured_without_such_a_budget() -> None:
    levels = [Level("a", 0.9, budget=Budget("macs", 0.3, True)), Level("b", 0.0)]
    assert latency.missed_latencies(Path("there-is-none"), levels, Observer()) == []


def test_a_missed_latency_is_an_error_after_the_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "bench", measured(0.5))
    output = tmp_path / "a.safetensors"
    options = {**FEW, "levels": "latency=0.3,latency=0.5,1", "train.epochs": 0, "output": str(output)}
    with pytest.raises(BudgetError, match=r"level\[1\].budget = latency=0.3 was missed"):
        package.compress("digits", options, observer=Observer())
    assert len(package.read_report(output).levels) == 3


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("NESTIFY_ENGINE_LIBRARY", "/there/is/none.so", "correct the path"),
        ("MISSING", "onnxscript", "nestify[onnx]"),
    ],
)
def test_what_the_engine_lacks_is_told_before_images_are_opened(
    variable: str, value: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    if variable == "MISSING":
        monkeypatch.setattr("nestify.compression.preflight.load_library", lambda: None)
        monkeypatch.setitem(sys.modules, value, None)
    else:
        monkeypatch.setenv(variable, value)
        load_library.cache_clear()
    with pytest.raises(NestifyError, match=re.escape(remedy)):
        package.plan("digits", {"levels": "latency=0.3,1", "data.path": "/there/is/no/folder"})
    load_library.cache_clear()
