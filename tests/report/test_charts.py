"""Charts: round ticks, points inside the frame, labels that overlap nothing."""

from dataclasses import replace
from fractions import Fraction
from itertools import combinations, pairwise
from math import dist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestify.file.summary import Report
from nestify.report.html.charts import (
    FRAME,
    HEIGHT,
    MOST_TICKS,
    REACH,
    WIDTH,
    Chart,
    Kind,
    Mark,
    Scale,
    Tick,
    bytes_chart,
    count_ticks,
    macs_chart,
    mebibyte_ticks,
    percent_ticks,
    round_ticks,
    separate,
)
from nestify.report.html.labels import LINE, Box, place_labels, shorten
from tests.report.reports import level, report

PERCENT = st.integers(0, 10_000).map(lambda hundredths: hundredths / 100)


# Scales


@pytest.mark.parametrize(
    ("ticks", "texts"),
    [
        (count_ticks(4_100_000), ["0", "1M", "2M", "3M", "4M", "5M"]),
        (count_ticks(1_200_000_000), ["0", "0.5G", "1.0G", "1.5G"]),
        (count_ticks(797_000), ["0", "200k", "400k", "600k", "800k"]),
        (count_ticks(7), ["0", "2", "4", "6", "8"]),
        (count_ticks(0), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (mebibyte_ticks(1_627_904), ["0", "0.5", "1.0", "1.5", "2.0"]),
        (mebibyte_ticks(300 * 2**20), ["0", "100", "200", "300"]),
        (percent_ticks([55.33]), ["54.5", "55.0", "55.5", "56.0"]),
        (percent_ticks([0.0, 100.0]), ["0", "20", "40", "60", "80", "100"]),
        (percent_ticks([100.0, 100.0]), ["99.0", "99.2", "99.4", "99.6", "99.8", "100.0"]),
        (percent_ticks([0.0]), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (percent_ticks([90.53, 99.44]), ["90", "92", "94", "96", "98", "100"]),
    ],
)
def test_ticks(ticks: tuple[Tick, ...], texts: list[str]) -> None:
    assert [tick.text for tick in ticks] == texts


@given(st.integers(0, 2**63), st.integers(1, 2**63), st.sampled_from([1, 1000, 10**6, 2**20]))
def test_ticks_are_round_and_cover_the_values(low: int, span: int, unit: int) -> None:
    ticks = round_ticks(low, low + span, unit)
    assert 2 <= len(ticks) <= MOST_TICKS
    written = [Fraction(tick.text) for tick in ticks]
    assert written[0] * unit <= low
    assert written[-1] * unit >= low + span
    steps = {after - before for before, after in pairwise(written)}
    [step] = steps
    while step >= 10:
        step /= 10
    while step < 1:
        step *= 10
    assert step in (1, 2, 5)
    assert [tick.value for tick in ticks] == pytest.approx([float(value * unit) for value in written])


@given(st.lists(PERCENT, min_size=1))
def test_percentages_stay_between_0_and_100(values: list[float]) -> None:
    ticks = percent_ticks(values)
    assert 0 <= ticks[0].value <= min(values)
    assert max(values) <= ticks[-1].value <= 100


def test_a_scale_is_linear() -> None:
    scale = Scale((Tick(10, "10"), Tick(20, "20"), Tick(30, "30")), 100, 0)
    assert [scale(value) for value in (10, 15, 30)] == [100, 75, 0]


# Labels


def test_boxes() -> None:
    box = Box(0, 0, 10, 10)
    assert box.overlaps(Box(9, 9, 11, 11))
    assert not box.overlaps(Box(10, 0, 20, 10))
    assert not box.overlaps(Box(0, 10, 10, 20))
    assert box.contains(Box(0, 0, 10, 10))
    assert not box.contains(Box(0, 0, 10, 10.1))


def test_a_label_is_next_to_its_point() -> None:
    room = Box(0, 0, 200, 100)
    [label] = place_labels(["tiny"], [(50, 50)], [Box(44, 44, 56, 56)], [], room)
    assert label is not None
    assert label.leader is None
    assert 6 <= label.box.left - 50 < 12
    assert (label.box.top + label.box.bottom) / 2 == pytest.approx(50)


def test_a_label_at_the_right_edge_is_on_the_left() -> None:
    [label] = place_labels(["tiny"], [(195, 50)], [Box(189, 44, 201, 56)], [], Box(0, 0, 200, 100))
    assert label is not None
    assert label.box.right < 195


def test_a_label_avoids_lines_if_it_can() -> None:
    line = Box(0, 49, 200, 51)
    [label] = place_labels(["tiny"], [(50, 50)], [Box(44, 44, 56, 56)], [line], Box(0, 0, 200, 100))
    assert label is not None
    assert not label.box.overlaps(line)
    everywhere = Box(0, 0, 200, 100)
    [label] = place_labels(["tiny"], [(50, 50)], [], [everywhere], everywhere)
    assert label is not None


def test_a_name_without_room_has_no_label() -> None:
    assert place_labels(["tiny"], [(5, 5)], [], [], Box(0, 0, 10, 10)) == [None]


def test_long_names_are_shortened_in_the_middle() -> None:
    assert shorten("sixteen letters.") == "sixteen letters."
    assert shorten("seventeen letters") == "seventee…letters"
    assert shorten("小" * 9) == "小小小小… 小小小"  # two columns each; half of one becomes a space


@given(
    st.lists(
        st.tuples(st.text("abc小", min_size=1, max_size=20), st.floats(0, 300), st.floats(0, 200)),
        min_size=1,
        max_size=20,
    )
)
@settings(max_examples=50)
def test_labels_overlap_nothing(items: list[tuple[str, float, float]]) -> None:
    room = Box(0, 0, 300, 200)
    taken = [Box(x - REACH, y - REACH, x + REACH, y + REACH) for _, x, y in items]
    placed = place_labels([name for name, _, _ in items], [(x, y) for _, x, y in items], taken, [], room)
    labels = [label for label in placed if label is not None]
    for index, label in enumerate(labels):
        assert room.contains(label.box)
        assert label.box.bottom - label.box.top == pytest.approx(LINE)
        assert not any(label.box.overlaps(box) for box in taken)
        for other in labels[:index]:
            assert not label.box.overlaps(other.box)
            assert not label.box.overlaps(other.leader_box)
            assert not label.leader_box.overlaps(other.box)


# Charts


def charts(source: Report) -> list[Chart]:
    made = [macs_chart(source), bytes_chart(source)]
    return [chart for chart in made if chart is not None]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**12),
            st.integers(0, 10**12),
            st.integers(8, 2**40),
            PERCENT,
            PERCENT | st.none(),
        ),
        min_size=1,
        max_size=12,
    ),
    PERCENT | st.none(),
)
@settings(max_examples=40, deadline=None)
def test_points_are_inside_the_frame(
    rows: list[tuple[int, int, int, float, float | None]], original: float | None
) -> None:
    levels = [
        level(
            k,
            len(rows),
            dense_macs=dense,
            effective_macs=effective,
            prefix_bytes=size,
            top1=top1,
            top1_before=before,
        )
        for k, (dense, effective, size, top1, before) in enumerate(rows, start=1)
    ]
    made = report(*levels, original={} if original is None else {"top1": original})
    for chart in charts(made):
        for mark in chart.marks:
            assert FRAME.contains(Box(mark.x - REACH, mark.y - REACH, mark.x + REACH, mark.y + REACH))
        for label in chart.labels:
            assert FRAME.contains(label.box)
        assert len(chart.labels) + chart.unlabelled == len(rows)
        if original is not None:
            assert chart.original is not None
            assert FRAME.top < chart.original < FRAME.bottom
    assert Box(0, 0, WIDTH, HEIGHT).contains(FRAME)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_levels_are_labelled_with_names(n: int) -> None:
    for chart in charts(report(*(level(k, n) for k in range(1, n + 1)))):
        assert [label.text for label in chart.labels] == [f"level{k}" for k in range(1, n + 1)]
        assert not chart.numbered


def test_twelve_long_names_are_replaced_by_numbers() -> None:
    levels = [level(k, 12, name=f"a-long-level-name-{k}") for k in range(1, 13)]
    for chart in charts(report(*levels)):
        assert chart.numbered
        assert chart.unlabelled == 0
        assert [label.text for label in chart.labels] == [str(k) for k in range(1, 13)]


def test_dense_and_effective_macs_are_two_series() -> None:
    chart = macs_chart(report(level(1, 2), level(2, 2)))
    assert chart is not None
    at = {(mark.kind, mark.text.partition(":")[0]): (mark.x, mark.y) for mark in chart.marks}
    assert at["dense", "level1"][0] == at["dense", "level2"][0] == at["effective", "level2"][0]
    assert at["effective", "level1"][0] < at["dense", "level1"][0]
    assert at["effective", "level1"][1] == at["dense", "level1"][1] > at["dense", "level2"][1]
    assert at["untrained", "level1"][0] == at["effective", "level1"][0]
    assert chart.links == ((at["dense", "level1"][0], *at["effective", "level1"]),)
    assert [kind for kind, _ in chart.legend] == ["effective", "dense", "untrained"]
    assert chart.original is not None
    assert chart.original < at["effective", "level2"][1]  # 91.25 over 90, and y grows downwards


def test_what_was_not_measured_is_left_out() -> None:
    first, second = level(1, 2), level(2, 2, top1_before=None)
    assert [chart.legend[-1][0] for chart in charts(report(replace(first, top1_before=None), second))] == [
        "dense",
        "bytes",
    ]
    only = charts(report(replace(first, top1=None), second))
    assert [[label.text for label in chart.labels] for chart in only] == [["level2"], ["level2"]]
    assert charts(report(replace(first, top1=None), replace(second, top1=None))) == []
    assert macs_chart(report(replace(first, dense_macs=None))) is None
    assert bytes_chart(report(replace(first, dense_macs=None))) is not None


def test_an_impossible_accuracy_is_not_drawn() -> None:
    for chart in charts(report(original={"top1": 1e300})):
        assert chart.original is None


# Marks at the same place


@given(
    st.lists(
        st.tuples(st.sampled_from(["dense", "untrained"]), st.integers(0, 20), st.integers(0, 20)),
        max_size=30,
    )
)
@settings(max_examples=50)
def test_no_mark_hides_another(items: list[tuple[Kind, int, int]]) -> None:
    marks = [Mark(kind, 100.0 + x, 100.0 + y, str(index)) for index, (kind, x, y) in enumerate(items)]
    moved = separate(marks)
    assert [mark.text for mark in moved] == [mark.text for mark in marks]
    for one, other in combinations(moved, 2):
        assert dist((one.x, one.y), (other.x, other.y)) >= REACH
    for mark, original in zip(moved, marks, strict=True):
        assert mark.origin in (None, (original.x, original.y))
        assert (mark.origin is None) == ((mark.x, mark.y) == (original.x, original.y))
        assert FRAME.contains(Box(mark.x - REACH, mark.y - REACH, mark.x + REACH, mark.y + REACH))


def test_a_dot_is_seen_in_a_square_and_in_a_ring() -> None:
    kinds: list[tuple[Kind, Kind]] = [("dense", "effective"), ("untrained", "bytes")]
    for pair in kinds:
        marks = [Mark(kind, 100.0, 100.0, kind) for kind in pair]
        assert separate(marks) == marks


def test_levels_of_equal_accuracy_and_cost_are_all_seen() -> None:
    levels = [level(k, 3, top1=99.44, top1_before=99.44, effective_macs=3 * 10**6) for k in (1, 2, 3)]
    chart = macs_chart(report(*levels))
    assert chart is not None
    assert chart.moved == 3 + 2 + 2  # rings, and of the squares and the dots all but one
    for kind in ("dense", "effective", "untrained"):
        assert len({(mark.x, mark.y) for mark in chart.marks if mark.kind == kind}) == 3
