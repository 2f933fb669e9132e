"""Budgets of latency over a made-up table of layer times."""

import re
import sys
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import pytest
import timm
from safetensors.torch import save_file

import nestify as package
from nestify.compression import latency
from nestify.engine.layer_times import LayerTime, LayerTimes, NetworkTimes
from nestify.engine.library import load_library
from nestify.errors import BudgetError, NestifyError, RecipeError
from nestify.recipe.amounts import Budget
from nestify.recipe.levels import Level
from nestify.schedule.costs import count_macs
from nestify.training.observer import Observer

FEW = {"data.max_train": 64, "data.max_val": 32, "train.batch_size": 32}


def even_times(networks, spec, packed: bool) -> LayerTimes:
    """Every weight takes 1 second; packed, a layer takes a tenth of that and nine tenths of its density."""
    assert packed
    [network] = networks
    sizes = {name: network.get_parameter(name).numel() for name in spec.maskable}
    layers = {name: LayerTime(float(n), 0.1 * n, 0.9 * n) for name, n in sizes.items()}
    shapes = {name: tuple(network.get_parameter(name).shape) for name in spec.maskable}
    return LayerTimes([NetworkTimes(layers, 0.0, 0.0, shapes)], 1)


def mac_times(networks, spec, packed: bool) -> LayerTimes:
    """Every multiply-accumulate takes 1 second, and one that is masked takes none."""
    measured = []
    for network in networks:
        macs = count_macs(network, spec.input_size).by_weight
        layers = {
            name: LayerTime(float(macs[name]), *((0.0, float(macs[name])) if packed else ()))
            for name in spec.maskable
        }
        shapes = {name: tuple(network.get_parameter(name).shape) for name in spec.maskable}
        measured.append(NetworkTimes(layers, 0.0, 0.0, shapes))
    return LayerTimes(measured, 1)


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestify.engine.profile.layer_times", even_times)
    monkeypatch.setattr("nestify.compression.preflight.load_library", lambda: None)


@pytest.mark.parametrize("score", ["uniform", "lamp", pytest.param("per_mac", marks=pytest.mark.long)])
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


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Options for a transformer of six blocks with random weights."""
    kwargs = {"img_size": 32, "patch_size": 8}
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=10, **kwargs).state_dict(), path)
    return {"model.name": "test_vit", "model.checkpoint": str(path), "model.kwargs": kwargs}


@pytest.mark.long
def test_where_time_is_proportional_to_macs_both_budgets_give_the_same_widths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nestify.engine.profile.layer_times", mac_times)
    options = {**FEW, "schedule.kind": "channel", "schedule.divisor": 2}
    by_time, by_macs = (
        package.plan("digits", {**options, "levels": f"{quantity}=0.3,{quantity}=0.6,1"}).levels
        for quantity in ("latency", "macs")
    )
    assert [level.level.width for level in by_time] == [level.level.width for level in by_macs]
    assert [level.cost.dense_macs for level in by_time] == [level.cost.dense_macs for level in by_macs]
    for planned, share in zip(by_time, (0.3, 0.6, 1.0), strict=True):
        assert planned.latency == pytest.approx(planned.cost.dense_macs / by_time[-1].cost.dense_macs)
        assert planned.latency == pytest.approx(share, rel=0.02)


def test_blocks_that_are_skipped_take_no_time(
    vit: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six equal blocks take all the time, so a level with n of them takes n sixths."""

    def block_times(networks, spec, packed: bool) -> LayerTimes:
        assert not packed
        [network] = networks
        inside = [name for name in spec.maskable if "blocks" in name]
        layers = {
            name: LayerTime(*(1.0, None, 0.0, 0.5) if name in inside else (0.0,)) for name in spec.maskable
        }
        rest = 0.5 * len(inside)
        shapes = {name: tuple(network.get_parameter(name).shape) for name in spec.maskable}
        return LayerTimes([NetworkTimes(layers, rest, rest, shapes)], 1)

    monkeypatch.setattr("nestify.engine.profile.layer_times", block_times)
    options = {**FEW, **vit, "schedule.kind": "layer"}
    plan = package.plan("digits", {**options, "levels": "latency=0.3333,latency=0.67,1"})
    assert [planned.level.depth for planned in plan.levels] == pytest.approx([2 / 6, 4 / 6, 1])
    assert [planned.latency for planned in plan.levels] == pytest.approx([2 / 6, 4 / 6, 1])
    with pytest.raises(RecipeError, match=r"latency=0.4 cannot be met .* 0.3333 \(depth 0.3333\) or 0.5 \("):
        package.plan("digits", {**options, "levels": "latency=0.4,1"})


@pytest.mark.long
def test_the_time_of_a_combined_level_is_that_of_its_channels_and_density(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nestify.engine.profile.layer_times", mac_times)
    recipe = tmp_path / "a.toml"
    recipe.write_text(
        'extends = "digits"\n[schedule]\nkind = "combined"\nscore = "uniform"\n'
        '[[level]]\nbudget = "latency=0.1"\nsparsity = 0.8\n[[level]]\nwidth = 1.0\n'
    )
    core, full = package.plan(recipe, FEW).levels
    assert core.level.sparsity == 0.8
    assert 0 < core.level.width < 1
    assert core.latency == pytest.approx(0.1, rel=0.02)
    assert core.cost.effective_macs / full.cost.effective_macs == pytest.approx(0.1, rel=0.02)


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


@pytest.mark.parametrize(("in_processor_time", "missed"), [(0.31, False), (0.4, True)])
def test_a_level_that_other_programs_slow_down_is_measured_in_processor_time(
    in_processor_time: float, missed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bench(path: Path, *, clock=perf_counter, **options):
        return measured(0.9 if clock is perf_counter else in_processor_time)(path, **options)

    monkeypatch.setattr(latency, "bench", bench)
    messages = latency.missed_latencies(Path("a"), LEVELS, Observer())
    assert len(messages) == missed
    assert all("takes 0.4 of" in message for message in messages)


def test_nothing_is_measured_without_such_a_budget() -> None:
    levels = [Level("a", 0.9, budget=Budget("macs", 0.3, True)), Level("b", 0.0)]
    assert latency.missed_latencies(Path("there-is-none"), levels, Observer()) == []


@pytest.mark.long  # test_own_loop.py has the same of another budget
def test_a_missed_latency_is_an_error_after_the_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "bench", measured(0.5))
    output = tmp_path / "a.safetensors"
    options = {**FEW, "levels": "latency=0.3,latency=0.5,1", "train.epochs": 0, "output": str(output)}
    options |= {"schedule.fit": False, "train.eval_before": False, "train.recalibrate_batches": 1}
    options["schedule.score"] = "uniform"
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
