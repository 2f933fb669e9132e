"""The choice of a level: what it must meet, and that no better one does."""

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nestify.errors import BadFileError, GateFailed, RecipeError
from nestify.evaluation.pick import Limit, Pick, choose
from nestify.file.summary import LevelReport, Report
from nestify.recipe.amounts import Limited, parse_amount, show_amount

LIMITED: tuple[Limited, ...] = ("latency", "bytes", "macs", "params", "top1")


def level(number: int, **changes: Any) -> LevelReport:
    facts: dict[str, Any] = {
        "name": f"size-{number}",
        "sparsity": 0.0,
        "width": 1.0,
        "depth": 1.0,
        "skipped": [],
        "pattern": "unstructured",
        "parameters": 10**9,
        "nonzero_parameters": 1000 * number,
        "dense_macs": 10**6 * number,
        "effective_macs": 1,
        "prefix_bytes": 10**5 * number,
        "top1": 60.0 + number,
        "top5": None,
        "loss": None,
        "images": None,
        "top1_before": None,
        "classes": 10,
        "class_set": "",
        "layers": [],
    }
    return LevelReport(level=number, **{**facts, **changes})


def report(*levels: LevelReport) -> Report:
    return Report("file", "resnet", 10, (3, 32, 32), "combined", 10**6, 100, {}, {}, list(levels), {})


THREE = report(level(1), level(2), level(3))
LATENCIES = {1: 0.001, 2: 0.002, 3: 0.003}


def picked(found: Pick) -> int | None:
    return found.level and found.level.level


@pytest.mark.parametrize(
    ("limits", "due"),
    [
        ({"latency": 0.002}, 2),
        ({"latency": 0.0029999}, 2),
        ({"bytes": 100_000}, 1),
        ({"bytes": 99_999}, None),
        ({"macs": 2.5e6}, 2),
        ({"params": 3000}, 3),
        ({"top1": 63}, 3),
        ({"top1": 63.1}, None),
        ({"bytes": 250_000, "latency": 0.01}, 2),
        ({"bytes": 250_000, "top1": 63}, None),
    ],
)
def test_the_best_that_meets_the_limits(limits: dict[Limited, float], due: int | None) -> None:
    assert picked(choose(THREE, [Limit(*limit) for limit in limits.items()], LATENCIES)) == due


@pytest.mark.parametrize(
    ("levels", "due"),
    [
        ([level(1, top1=70.0), level(2, top1=65.0), level(3, top1=69.0)], 1),  # the higher levels are worse
        ([level(1, top1=50.0), level(2, top1=65.0), level(3, top1=65.0)], 2),  # as good, and costs less
        ([level(1, top1=90.0, class_set="kind"), level(2), level(3)], 3),  # of fewer classes
        ([level(1, top1=90.0), level(2, top1=None), level(3, top1=80.0)], 3),
        ([level(1, top1=None), level(2, top1=None), level(3, top1=None)], 3),
    ],
)
def test_what_is_best(levels: list[LevelReport], due: int) -> None:
    assert picked(choose(report(*levels), [Limit("bytes", 1e9)])) == due


def refusal(found: Pick) -> str:
    with pytest.raises(GateFailed) as refused:
        found.check()
    return str(refused.value)


def test_why_there_is_none() -> None:
    assert refusal(choose(THREE, [Limit("latency", 0.0005), Limit("bytes", 1e9)], LATENCIES)) == (
        "file: no level meets --max-latency 500us (size-1 comes nearest with 1ms); loosen the limit"
    )
    assert refusal(choose(THREE, [Limit("bytes", 2000), Limit("top1", 99)])) == (
        "file: no level meets --max-bytes 2kB (size-1 comes nearest with 100kB) and --min-top1 99% (size-3 "
        "comes nearest with 63%); loosen the limits"
    )
    assert refusal(choose(THREE, [Limit("bytes", 250_000), Limit("top1", 63)])) == (
        "file: each limit is met by some level, but no level meets all: size-1 misses --min-top1 63%, size-2 "
        "misses --min-top1 63%, size-3 misses --max-bytes 250kB; loosen one"
    )


def test_what_the_file_does_not_say() -> None:
    unknown = report(level(1, top1=None), level(2, top1=None))
    with pytest.raises(BadFileError, match="holds no top-1, which --min-top1 70% needs; compress it with"):
        choose(unknown, [Limit("top1", 70)])
    with pytest.raises(BadFileError, match="does not say what --max-macs 1M limits"):
        choose(report(level(1, dense_macs=None)), [Limit("macs", 1e6)])
    partly = report(level(1, top1=None), level(2, top1=80.0))
    assert picked(choose(partly, [Limit("top1", 70)])) == 2


@pytest.mark.parametrize(
    "limits",
    [
        [],
        [Limit("bytes", 0)],
        [Limit("bytes", 1), Limit("macs", -1)],
        [Limit("latency", math.nan)],
        [Limit("params", math.inf)],
        [Limit("top1", 100.5)],
    ],
)
def test_limits_that_are_none(limits: list[Limit]) -> None:
    with pytest.raises(RecipeError, match=r"no limit is given|is not above 0 and finite|is above 100"):
        choose(THREE, limits, LATENCIES)


# Properties

SMALL = st.integers(1, 6)
LEVELS = st.lists(
    st.fixed_dictionaries(
        {
            "prefix_bytes": SMALL,
            "dense_macs": st.none() | SMALL,
            "nonzero_parameters": SMALL,
            "top1": st.none() | SMALL,
            "class_set": st.sampled_from(["", "", "kind"]),
        }
    ),
    min_size=1,
    max_size=5,
).map(lambda levels: report(*(level(k, **facts) for k, facts in enumerate(levels, start=1))))
LIMITS = st.dictionaries(st.sampled_from(LIMITED), SMALL, min_size=1)
TIMES = st.lists(SMALL, min_size=5, max_size=5).map(lambda times: dict(enumerate(times, start=1)))


def values(of: LevelReport, times: dict[int, int]) -> dict[str, float | None]:
    return {
        "latency": times[of.level],
        "bytes": of.prefix_bytes,
        "macs": of.dense_macs,
        "params": of.nonzero_parameters,
        "top1": of.top1,
    }


def meets(of: LevelReport, times: dict[int, int], limits: dict[Limited, int]) -> bool:
    """Counted by hand."""
    known = values(of, times)
    costs = [(known[name], bound) for name, bound in limits.items() if name != "top1"]
    if any(value is None or value > bound for value, bound in costs):
        return False
    return "top1" not in limits or (of.top1 is not None and of.top1 >= limits["top1"])


def chosen(of: Report, limits: dict[Limited, int], times: dict[int, int]) -> int | None:
    assume(all(any(values(each, times)[name] is not None for each in of.levels) for name in limits))
    found = choose(of, [Limit(name, bound) for name, bound in limits.items()], times)
    if found.level is None:
        assert "no level meets" in refusal(found)
    return picked(found)


@given(LEVELS, LIMITS, TIMES)
def test_it_meets_every_limit_and_none_that_does_is_better(
    of: Report, limits: dict[Limited, int], times: dict[int, int]
) -> None:
    level = chosen(of, limits, times)
    allowed = [each for each in of.levels if meets(each, times, limits)]
    assert (level is None) == (not allowed)
    if level is None:
        return
    assert level in [each.level for each in allowed]
    comparable = len({each.class_set for each in of.levels}) == 1 and all(
        each.top1 is not None for each in of.levels
    )
    if comparable:
        assert of.levels[level - 1].top1 == max(each.top1 or 0 for each in allowed)
    else:
        assert level == max(each.level for each in allowed)


@given(LEVELS, LIMITS, TIMES, st.data())
def test_a_tighter_limit_gives_no_better_level(
    of: Report, limits: dict[Limited, int], times: dict[int, int], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(limits)))
    bound = limits[name] + (1 if name == "top1" else -1)
    assume(bound > 0)
    before, after = chosen(of, limits, times), chosen(of, {**limits, name: bound}, times)
    if after is None:
        return
    assert before is not None
    # what is picked after was allowed before, and was not preferred then
    assert meets(of.levels[after - 1], times, limits)
    if after != before:
        assert not meets(of.levels[before - 1], times, {**limits, name: bound})


@given(st.sampled_from(LIMITED), st.floats(1e-7, 1e12))
def test_a_shown_amount_is_read_again(limited: Limited, value: float) -> None:
    assert parse_amount(limited, show_amount(limited, value)) == pytest.approx(value, rel=1e-4)
