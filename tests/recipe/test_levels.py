"""Patterns and levels, and what keeps levels from nesting."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestify.recipe.levels import MAX_LEVELS, Level, Pattern, check_levels, parse_pattern

ORDER = "levels run from the core (sparsest) to the full level"
UNSTRUCTURED = Pattern()
sparsities = st.floats(0, 1, exclude_max=True)


def make(*values: float, pattern: Pattern = UNSTRUCTURED) -> list[Level]:
    return [Level(f"level{k}", value, pattern) for k, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", Pattern()),
        ("2:4", Pattern("n:m", n=2, m=4)),
        ("1:16", Pattern("n:m", n=1, m=16)),
        ("32x1", Pattern("block", rows=32, cols=1)),
        ("1x4", Pattern("block", rows=1, cols=4)),
    ],
)
def test_a_pattern_is_read_and_written(text: str, pattern: Pattern) -> None:
    assert parse_pattern(text) == pattern
    assert str(pattern) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:4", "pattern '4:4' keeps 4 of 4; N:M needs 1 <= N < M"),
        ("0:4", "pattern '0:4' keeps 0 of 4; N:M needs 1 <= N < M"),
        ("1x1", "pattern '1x1' is not a block; RxC needs at least two weights"),
        ("0x8", "pattern '0x8' is not a block; RxC needs at least two weights"),
        ("\u0662:4", "pattern '\u0662:4' is not one of unstructured, N:M (2:4) or RxC (32x1)"),
        ("2:4\n", "pattern '2:4\\n' is not one of unstructured, N:M (2:4) or RxC (32x1)"),
        ("", "pattern '' is not one of unstructured, N:M (2:4) or RxC (32x1)"),
    ],
)
def test_a_wrong_pattern_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_pattern(text)


def test_only_an_n_of_m_pattern_sets_the_sparsity() -> None:
    assert parse_pattern("1:4").sparsity == 0.75
    assert parse_pattern("unstructured").sparsity is None
    assert parse_pattern("32x1").sparsity is None


@settings(deadline=None)  # a busy machine is no defect
@given(st.lists(sparsities, min_size=2, max_size=20, unique=True))
def test_strictly_decreasing_sparsities_nest(values: list[float]) -> None:
    assert check_levels(make(*sorted(values, reverse=True))) == []


@settings(deadline=None)  # a busy machine is no defect
@given(st.lists(sparsities, min_size=2, max_size=20), st.data())
def test_every_step_that_does_not_get_denser_is_told(values: list[float], data: st.DataObject) -> None:
    falling = sorted(values, reverse=True)
    k = data.draw(st.integers(1, len(values) - 1))
    falling[k] = data.draw(st.floats(falling[k - 1], 1, exclude_max=True))
    higher, lower = falling[k], falling[k - 1]
    told = f"level[{k + 1}].sparsity = {higher!r} is not below level[{k}].sparsity = {lower!r}; {ORDER}"
    assert told in check_levels(make(*falling))


@pytest.mark.parametrize("value", [1.0, 1.5, -0.1, float("nan"), float("inf")])
def test_a_sparsity_out_of_range_is_one_problem(value: float) -> None:
    assert check_levels(make(0.9, value, 0.0)) == [f"level[2].sparsity = {value} is not in [0, 1); {ORDER}"]


@pytest.mark.parametrize(("count", "text"), [(0, "0 levels"), (1, "1 level"), (255, "255 levels")])
def test_the_number_of_levels_is_limited(count: int, text: str) -> None:
    levels = make(*(1 - (k + 1) / 256 for k in range(count)))
    assert check_levels(levels) == [
        f"{text} given; a nested network has 2 to {MAX_LEVELS}, from the core (sparsest) to the full level"
    ]
    assert check_levels(make(*(1 - (k + 1) / 256 for k in range(MAX_LEVELS)))) == []


def test_a_name_is_used_once() -> None:
    levels = [Level("a", 0.9), Level("b", 0.5), Level("a", 0.0)]
    assert check_levels(levels) == [
        "level[3].name = 'a' is the name of level[1] already; give each level its own"
    ]


@pytest.mark.parametrize("name", ["", "2", "all", "a b", "a/b", "-x", "..", "x" * 65, "a\n"])
def test_a_name_that_cannot_be_told_from_others_is_refused(name: str) -> None:
    assert check_levels([Level(name, 0.9), Level("full", 0.0)]) == [
        f"level[1].name = {name!r} is not allowed; use up to 64 letters, digits, '-', '_' and '.', "
        "not a bare number, and not all"
    ]


@pytest.mark.parametrize("name", ["core", "level1", "80percent", "a.b-c_d", "allow", "größe"])
def test_other_names_are_allowed(name: str) -> None:
    assert check_levels([Level(name, 0.9), Level("full", 0.0)]) == []


def test_patterns_nest_where_they_are_of_one_kind() -> None:
    chain = [Level("a", 0.75, parse_pattern("1:4")), Level("b", 0.5, parse_pattern("2:4")), Level("c", 0.0)]
    assert check_levels(chain) == []
    assert check_levels(make(0.9, 0.5, 0.0, pattern=parse_pattern("32x1"))) == []


@pytest.mark.parametrize(
    "texts", [("1:4", "4:8"), ("32x1", "16x1"), ("unstructured", "2:4"), ("4x1", "unstructured")]
)
def test_patterns_of_different_kinds_do_not_nest(texts: tuple[str, str]) -> None:
    core, middle = map(parse_pattern, texts)
    levels = [
        Level("a", core.sparsity or 0.9, core),
        Level("b", middle.sparsity or 0.6, middle),
        Level("c", 0.0),
    ]
    assert check_levels(levels) == [
        f"patterns {', '.join(texts)} do not nest; sparse levels share one kind: "
        "unstructured, N:M of one M, or blocks of one shape"
    ]


def test_a_sparsity_agrees_with_its_pattern() -> None:
    levels = [Level("a", 0.9, parse_pattern("1:4")), Level("b", 0.0)]
    assert check_levels(levels) == [
        "level[1].sparsity = 0.9 does not agree with pattern 1:4, which is a sparsity of 0.75; "
        "give one of the two"
    ]


def test_a_level_that_is_wrong_elsewhere_keeps_its_number() -> None:
    assert check_levels([None, Level("a", 0.9), None, Level("b", 0.9)]) == [
        f"level[4].sparsity = 0.9 is not below level[2].sparsity = 0.9; {ORDER}"
    ]


shares = st.floats(0, 1, exclude_min=True)


@settings(deadline=None)
@given(st.lists(st.tuples(shares, shares, sparsities), min_size=2, max_size=6, unique=True), st.data())
def test_levels_nest_where_no_axis_falls(
    values: list[tuple[float, float, float]], data: st.DataObject
) -> None:
    columns = [sorted(column) for column in zip(*values, strict=True)]
    rising = dict.fromkeys(zip(columns[0], columns[1], columns[2][::-1], strict=True))
    rows = [*[row for row in rising if row[:2] != (1, 1)], (1.0, 1.0, 0.0)]
    levels = [Level(f"l{k}", s, width=w, depth=d) for k, (w, d, s) in enumerate(rows)]
    if len(levels) < 2:
        return
    assert check_levels(levels) == []
    axis = data.draw(st.sampled_from(["width", "depth"]))
    k = data.draw(st.integers(1, len(levels) - 1))
    below, least = getattr(levels[k - 1], axis), 1e-6
    if below <= least:
        return
    levels[k] = replace(levels[k], **{axis: data.draw(st.floats(least, below, exclude_max=True))})
    told = f"level[{k + 1}].{axis} = {getattr(levels[k], axis)!r} is not above level[{k}].{axis} = {below!r}"
    assert any(problem.startswith(told) for problem in check_levels(levels))


@pytest.mark.parametrize(
    ("level", "told"),
    [
        (Level("b", 0.0, width=0.5), "level[2].width = 0.5 is not 1; the full level has all channels"),
        (Level("b", 0.0, depth=0.5), "level[2].depth = 0.5 is not 1; the full level has all blocks"),
        (Level("b", 0.0, depth=1.5), "level[2].depth = 1.5 is not in (0, 1]; levels run from the core"),
        (Level("b", 0.0, width=0.0), "level[2].width = 0.0 is not in (0, 1]; levels run from the core"),
    ],
)
def test_the_full_level_has_all(level: Level, told: str) -> None:
    (problem,) = check_levels([Level("a", 0.5, width=0.25, depth=0.25), level])
    assert problem.startswith(told)


def test_blocks_do_not_go_with_narrower_levels() -> None:
    levels = [Level("a", 0.5, parse_pattern("32x1"), width=0.5), Level("b", 0.0)]
    assert check_levels(levels) == [
        "pattern 32x1 does not go with level[1].width below 1; narrower levels take unstructured or N:M"
    ]
    assert check_levels([Level("a", 0.5, parse_pattern("32x1"), depth=0.5), Level("b", 0.0)]) == []
