"""Gates against limits worked out by hand."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestify.errors import BadFileError, RecipeError
from nestify.evaluation.gates import State, check_gates
from nestify.recipe.gates import Gates, LevelGates
from nestify.report.evaluation import gates_table, missed_gates
from tests.report.report_builders import report

TOP1 = st.integers(0, 100).map(float)


def states(gates: Gates, *levels: dict[str, object], **options: object) -> dict[tuple[int, str], State]:
    results = check_gates(gates, report(*levels), **options)  # type: ignore[arg-type]
    return {(result.level, result.gate): result.state for result in results}


def test_each_limit_holds_up_to_itself() -> None:
    level = {"top1": 70.0, "prefix_bytes": 4_000_000, "dense_macs": 10**9, "nonzero_parameters": 2000}
    kept = Gates(min_top1=70, max_bytes="4MB", max_macs="1G", max_params="2k")
    assert set(states(kept, level).values()) == {"met"}
    over = Gates(min_top1=70.01, max_bytes=3_999_999, max_macs="999M", max_params=1999)
    assert set(states(over, level).values()) == {"missed"}


@pytest.mark.parametrize(
    ("gate", "key", "value", "score"),
    [
        ("min_map", "map", 70.0, 70),
        ("min_agreement", "agreement", 70.0, 70),
        ("min_cosine", "cosine", 0.7, 70),
    ],
)
def test_limits_of_other_metrics(gate: str, key: str, value: float, score: float) -> None:
    level = {"top1": None, key: value}
    assert states(Gates.model_validate({gate: score}), level) == {(1, gate): "met"}
    assert states(Gates.model_validate({gate: score + 0.1}), level) == {(1, gate): "missed"}
    assert states(Gates(min_top1=0), level) == {(1, "min_top1"): "missed"}


def test_drops_of_precision_are_from_the_full_level() -> None:
    levels = [{"top1": None, "map": 60.0}, {"top1": None, "map": 63.0}]
    assert states(Gates(max_drop=3), *levels) == {(1, "max_drop"): "met"}
    assert states(Gates(max_drop=2.9), *levels) == {(1, "max_drop"): "missed"}


def test_a_limit_of_a_level_stands_in_for_that_of_all() -> None:
    gates = Gates(
        min_top1=60, max_bytes="1MB", level={"level1": LevelGates(min_top1=10), "2": LevelGates(min_top1=80)}
    )
    found = states(gates, {"top1": 20.0}, {"top1": 70.0}, {"top1": 60.0})
    assert [found[k, "min_top1"] for k in (1, 2, 3)] == ["met", "missed", "met"]
    assert [found[k, "max_bytes"] for k in (1, 2, 3)] == ["missed"] * 3


@given(st.lists(TOP1, min_size=1, max_size=5), TOP1)
def test_drops_are_from_the_full_level(top1: list[float], limit: float) -> None:
    found = states(Gates(max_drop=limit), *({"top1": value} for value in top1))
    assert found == {
        (k, "max_drop"): "met" if top1[-1] - value <= limit else "missed"
        for k, value in enumerate(top1[:-1], start=1)
    }


def test_a_drop_is_not_compared_across_a_hierarchy_unless_asked_for() -> None:
    levels = [{"top1": 80.0, "class_set": "kind", "classes": 3}, {"top1": 70.0}]
    assert states(Gates(max_drop=1), *levels) == {(1, "max_drop"): "not compared"}
    own = Gates(level={"1": LevelGates(max_drop=1)})
    assert states(own, *levels) == {(1, "max_drop"): "met"}


@pytest.mark.parametrize("gates", [Gates(min_top1=0), Gates(max_drop=100)])
def test_what_was_not_measured_keeps_no_limit(gates: Gates) -> None:
    found = states(gates, {"top1": None}, {"top1": None})
    assert set(found.values()) == {"missed"}


def test_a_baseline_has_the_same_levels_by_name(tmp_path: Path) -> None:
    baseline = report({"top1": 50.3}, {"top1": 70.0}, {"top1": 71.0, "classes": 5})
    stored = tmp_path / "baseline.json"
    stored.write_text(json.dumps(baseline.to_dict()))
    levels = [{"top1": 50.0}, {"top1": 70.5}, {"top1": 71.0}, {"top1": 99.0}]
    for options in ({"baseline": baseline}, {}):
        gates = Gates(max_regression=0.3, baseline=str(stored))
        found = states(gates, *levels, **options)
        # of 0.3 points that are met in decimals; of other classes; and of a level that is not there
        assert list(found.values()) == ["met", "met", "missed", "missed"]
    assert states(Gates(max_regression=0.29), levels[0], baseline=baseline) == {
        (1, "max_regression"): "missed"
    }


def test_levels_that_are_not_there_are_refused() -> None:
    gates = Gates(level={"phone": LevelGates(min_top1=1)})
    with pytest.raises(RecipeError, match=r"gates\.level\.phone: .* no such level; its levels are level1"):
        check_gates(gates, report({}))


def test_a_baseline_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    gates = Gates(max_regression=1, baseline=str(tmp_path / "none.json"))
    with pytest.raises(BadFileError, match=r"none\.json: cannot be read"):
        check_gates(gates, report({}))


def test_the_table_names_limit_and_value() -> None:
    gates = Gates(min_top1=70, max_bytes="4MB")
    results = check_gates(gates, report({"top1": 69.5, "prefix_bytes": 4_000_001}, {"top1": None}))
    rows = zip(*(column.cells for column in gates_table(results).columns), strict=True)
    assert [row[3:] for row in rows] == [
        ("70.00 %", "69.50 %", "MISSED"),
        ("4,000,000", "4,000,001", "MISSED"),
        ("70.00 %", "not known", "MISSED"),
        ("4,000,000", "4,000,000", "ok"),
    ]
    assert missed_gates(results) == (
        "min_top1 of level 1 (level1): 69.50 %, limit 70.00 %; "
        "max_bytes of level 1 (level1): 4,000,001, limit 4,000,000; "
        "min_top1 of level 2 (level2): not known, limit 70.00 %"
    )
    assert asdict(results[0])["state"] == "missed"
