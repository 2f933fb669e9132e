"""Charts of accuracy against cost, as coordinates that a template draws. Pure arithmetic."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from itertools import accumulate
from math import dist
from typing import Literal

from nestify.file.summary import LevelReport, Report
from nestify.recipe.metric import metric_of
from nestify.report.html.labels import Box, Label, place_labels
from nestify.report.table import mebibytes, quantity

MOST_TICKS = 6
"""Maximum number of ticks on an axis."""


@dataclass(frozen=True)
class Tick:
    """A tick of an axis: a round value and its text."""

    value: float
    text: str


@dataclass(frozen=True)
class Scale:
    """Linear map from values to positions.

    Attributes:
        ticks: ticks of the axis, in ascending order.
        begin: position of the first tick.
        end: position of the last tick.
    """

    ticks: tuple[Tick, ...]
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        first, last = self.ticks[0].value, self.ticks[-1].value
        return self.begin + (value - first) / (last - first) * (self.end - self.begin)


def round_ticks(low: float, high: float, unit: int = 1, suffix: str = "") -> tuple[Tick, ...]:
    """Return ticks at round values that cover the range from `low` to `high`.

    There are two to `MOST_TICKS` of them, at multiples of 1, 2 or 5 times a power of ten units. All texts
    have the same number of digits after the decimal point.

    Args:
        low: smallest value.
        high: largest value, above `low`.
        unit: value that is written as 1 on the axis.
        suffix: appended to all texts except "0".
    """
    assert low < high
    least, most = (Decimal(value) / unit for value in (low, high))
    power = math.floor(math.log10((most - least) / (MOST_TICKS - 1)))
    for mantissa in (1, 2, 5, 10, 20, 50):  # the last one always fits
        step = Decimal(mantissa).scaleb(power).normalize()
        first = int((least / step).to_integral_value(ROUND_FLOOR))
        last = int((most / step).to_integral_value(ROUND_CEILING))
        if last - first < MOST_TICKS:
            break
    rounded = [step * index for index in range(first, last + 1)]
    return tuple(Tick(float(value * unit), f"{value:f}{suffix}" if value else "0") for value in rounded)


def percent_ticks(values: Sequence[float]) -> tuple[Tick, ...]:
    """Return ticks that cover percentages, and at least one point."""
    low, high = min(values), max(values)
    if high - low < 1:
        low = min(max((low + high - 1) / 2, 0.0), 99.0)
        high = low + 1
    return round_ticks(low, high)


def count_ticks(largest: float) -> tuple[Tick, ...]:
    """Return ticks from 0 to at least a number of MACs, in k, M or G."""
    for unit, suffix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if largest >= unit:
            return round_ticks(0, largest, unit, suffix)
    return round_ticks(0, max(largest, 1))


def mebibyte_ticks(largest: int) -> tuple[Tick, ...]:
    """Return ticks from 0 to at least a number of bytes, in MiB."""
    return round_ticks(0, max(largest, 1), 2**20)


WIDTH, HEIGHT = 360, 270
"""Size of a chart in SVG units, as all lengths and positions here."""
FRAME = Box(50, 10, WIDTH - 8, HEIGHT - 42)
"""The rectangle that the axes enclose."""
INSET = 10
"""Distance from the frame to the outermost points, so that their marks are completely inside the frame."""
REACH = 6
"""Distance from the centre of a mark to its edge."""

Kind = Literal["dense", "effective", "bytes", "untrained"]


@dataclass(frozen=True)
class Mark:
    """A point of a chart.

    Attributes:
        kind: series that the point belongs to.
        x: horizontal position.
        y: vertical position, which grows downwards.
        text: shown when the pointer is over the mark.
        origin: position (x, y) of its values, if the mark was moved away from there; else None.
    """

    kind: Kind
    x: float
    y: float
    text: str
    origin: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """A scatter plot of levels.

    Attributes:
        key: unique name of the chart on its page.
        title: title of the chart.
        x_title: quantity and unit of the x axis.
        y_title: quantity and unit of the y axis.
        x: the x axis.
        y: the y axis, the score in percent.
        marks: points of all series, in drawing order.
        links: horizontal lines (x1, x2, y) between the marks of a level.
        labels: names of the levels, or their numbers if there is no room for all names.
        numbered: whether the labels are numbers.
        unlabelled: number of levels without a label, because there is no room for their numbers either.
        original: y of the model before nesting; None if not known.
        legend: kinds of marks, each with its text.
        description: the chart in words, for screen readers.
        moved: number of marks that were moved, because they would have hidden another one.
    """

    key: str
    title: str
    x_title: str
    y_title: str
    x: Scale
    y: Scale
    marks: tuple[Mark, ...]
    links: tuple[tuple[float, float, float], ...]
    labels: tuple[Label, ...]
    numbered: bool
    unlabelled: int
    original: float | None
    legend: tuple[tuple[Kind, str], ...]
    description: str
    moved: int


@dataclass(frozen=True)
class _Dot:
    """A point in units of the data: cost in MACs or bytes, score in percent."""

    kind: Kind
    cost: float
    score: float
    text: str


def macs_chart(report: Report) -> Chart | None:
    """Return the chart of scores against effective and dense MACs; None if no level has all three values."""
    groups, title = [], report.metric.title
    for level in report.levels:
        if level.score is None or level.dense_macs is None or level.effective_macs is None:
            continue
        dense, effective = (quantity(macs) for macs in (level.dense_macs, level.effective_macs))
        score = f"{title} {level.score:.2f} %"
        dots = [
            _Dot("dense", level.dense_macs, level.score, f"{level.name}: {score}, dense MACs {dense}"),
            *_untrained(level, level.effective_macs, title),
            _Dot(
                "effective",
                level.effective_macs,
                level.score,
                f"{level.name}: {score}, effective MACs {effective}",
            ),
        ]
        groups.append((level, dots))
    legend: list[tuple[Kind, str]] = [("effective", "effective MACs"), ("dense", "dense MACs")]
    return _chart(report, "macs", f"{score_subject(report)} against MACs", "MACs per image", groups, legend)


def bytes_chart(report: Report) -> Chart | None:
    """Return the chart of scores against bytes of the prefix; None if no level was evaluated."""
    groups, title = [], report.metric.title
    for level in report.levels:
        if level.score is None:
            continue
        text = f"{level.name}: {title} {level.score:.2f} %, prefix {mebibytes(level.prefix_bytes)} MiB"
        before = _untrained(level, level.prefix_bytes, title)
        dots = [*before, _Dot("bytes", level.prefix_bytes, level.score, text)]
        groups.append((level, dots))
    legend: list[tuple[Kind, str]] = [("bytes", "prefix that the level needs")]
    return _chart(report, "bytes", f"{score_subject(report)} against bytes", "prefix, MiB", groups, legend)


def score_subject(report: Report) -> str:
    """Return what the levels of a report are judged by, for headings."""
    return report.metric.subject


def _untrained(level: LevelReport, cost: float, title: str) -> list[_Dot]:
    before = metric_of(level).score_before(level)
    if before is None:
        return []
    return [_Dot("untrained", cost, before, f"{level.name}: {title} {before:.2f} % before training")]


def _chart(
    report: Report,
    key: str,
    title: str,
    x_title: str,
    groups: Sequence[tuple[LevelReport, Sequence[_Dot]]],
    legend: Sequence[tuple[Kind, str]],
) -> Chart | None:
    """Return the chart of levels; None if there are none.

    Args:
        groups: levels with their points; the last point of each level gets the label.
    """
    if not groups:
        return None
    dots = [dot for _, group in groups for dot in group]
    original = report.original.get(report.metric.key)
    if original is not None and not 0 <= original <= 100:  # the file is not trusted
        original = None
    largest = max(dot.cost for dot in dots)
    x_ticks = mebibyte_ticks(int(largest)) if key == "bytes" else count_ticks(largest)
    values = [dot.score for dot in dots] + ([] if original is None else [original])
    x = Scale(x_ticks, FRAME.left + INSET, FRAME.right - INSET)
    y = Scale(percent_ticks(values), FRAME.bottom - INSET, FRAME.top + INSET)
    marks = separate([Mark(dot.kind, x(dot.cost), y(dot.score), dot.text) for dot in dots])
    ends = accumulate(len(group) for _, group in groups)  # marks are in the order of the dots
    points = [(marks[end - 1].x, marks[end - 1].y) for end in ends]
    marks.sort(key=lambda mark: ("dense", "untrained", "effective", "bytes").index(mark.kind))
    links = [(x(group[0].cost), x(group[-1].cost), y(group[-1].score)) for _, group in groups]
    links = [link for link in links if link[0] != link[1]]
    lines = [(min(x1, x2), max(x1, x2), height) for x1, x2, height in links]
    if original is not None:
        lines.append((FRAME.left, FRAME.right, y(original)))
    taken = [Box(mark.x - REACH, mark.y - REACH, mark.x + REACH, mark.y + REACH) for mark in marks]
    line_boxes = [Box(left, height - 1, right, height + 1) for left, right, height in lines]
    placed = place_labels([level.name for level, _ in groups], points, taken, line_boxes, FRAME)
    if numbered := None in placed:
        placed = place_labels([str(level.level) for level, _ in groups], points, taken, line_boxes, FRAME)
    untrained: list[tuple[Kind, str]] = [("untrained", "before training")]
    return Chart(
        key=key,
        title=title,
        x_title=x_title,
        y_title=f"{report.metric.title}, %",
        x=x,
        y=y,
        marks=tuple(marks),
        links=tuple(links),
        labels=tuple(label for label in placed if label is not None),
        numbered=numbered,
        unlabelled=placed.count(None),
        original=None if original is None else y(original),
        legend=(*legend, *(untrained if any(dot.kind == "untrained" for dot in dots) else [])),
        description="; ".join(dot.text for dot in dots),
        moved=sum(mark.origin is not None for mark in marks),
    )


NESTED: tuple[set[Kind], ...] = ({"effective", "dense"}, {"effective", "untrained"}, {"bytes", "untrained"})
"""Kinds of marks that can be seen both at the same place: a small dot in a square or in a ring."""


def separate(marks: Sequence[Mark]) -> list[Mark]:
    """Move marks that would hide another mark to the nearest free place inside the frame.

    Returns:
        The marks, in their order.
    """
    placed: dict[int, Mark] = {}
    for index, mark in enumerate(marks):
        if not any(_hides(mark, other) for other in placed.values()):
            placed[index] = mark
    for index, mark in enumerate(marks):
        if index not in placed:
            free = (
                replace(mark, x=x, y=y, origin=(mark.x, mark.y))
                for x, y in _places_around(mark.x, mark.y)
                if FRAME.contains(Box(x - REACH, y - REACH, x + REACH, y + REACH))
                and all(dist((x, y), (other.x, other.y)) >= 2 * REACH for other in placed.values())
            )
            placed[index] = next(free, mark)
    return [placed[index] for index in range(len(marks))]


def _hides(mark: Mark, other: Mark) -> bool:
    """Return whether two marks overlap so much that one of them may be overlooked."""
    is_near = dist((mark.x, mark.y), (other.x, other.y)) < REACH
    return is_near and {mark.kind, other.kind} not in NESTED


def _places_around(x: float, y: float) -> Iterator[tuple[float, float]]:
    """Yield positions around a point, the nearest first."""
    for ring in range(1, 9):
        steps = 8 * ring
        for step in range(steps):
            angle = 2 * math.pi * step / steps
            away = (2 * REACH + 0.5) * ring
            yield x + away * math.cos(angle), y + away * math.sin(angle)
