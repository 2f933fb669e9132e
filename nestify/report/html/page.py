"""A report as an HTML page. This module makes the values; `templates` holds the markup.

The texts of a file are not trusted: templates escape all texts, and characters that are not visible, such as
those that change the direction of a text, are shown as escape codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nestify.file.class_accuracy import SavedAccuracy
from nestify.file.history import History
from nestify.file.summary import Report
from nestify.report.html import charts
from nestify.report.html.by_class import worst_classes
from nestify.report.html.curves import curve_charts
from nestify.report.html.labels import BASELINE, FONT_SIZE
from nestify.report.sheet import Sheet, settings
from nestify.report.table import (
    bytes_table,
    calibration_table,
    mebibytes,
    number,
    quantity,
    report_notes,
    report_table,
    tensor_table,
)
from nestify.text import printable

NAME_END = 14
"""Number of letters at the end of a layer's name that are always shown; the rest needs room."""


@dataclass(frozen=True)
class Bar:
    """A bar that shows the bytes of one part of a file.

    Attributes:
        name: name of the level, or "header".
        text: size of the part.
        shares: segments of the bar: (kind, size in percent of the largest part, text).
    """

    name: str
    text: str
    shares: tuple[tuple[str, float, str], ...]


@dataclass(frozen=True)
class HeatRow:
    """The densities of one weight tensor.

    Attributes:
        head: beginning of the tensor's name.
        tail: end of the name, its last `NAME_END` letters.
        weights: number of its weights, as text.
        cells: per level, the density in percent and as text; None if the level has no weights of the tensor.
    """

    head: str
    tail: str
    weights: str
    cells: tuple[tuple[float | None, str], ...]


@dataclass(frozen=True)
class ClassGroups:
    """A set of coarser classes.

    Attributes:
        name: name of the set.
        levels: names of the levels that predict these classes.
        groups: pairs of a coarse class and the model's classes in it.
    """

    name: str
    levels: list[str]
    groups: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class PageSection:
    """An additional section of the page; it is left out if it has neither tables nor notes.

    Attributes:
        key: unique name of the section on the page.
        title: heading.
        sheets: tables.
        notes: notes below the tables.
    """

    key: str
    title: str
    sheets: Sequence[Sheet] = ()
    notes: Sequence[str] = ()


NO_HISTORY = History()
NOT_EVALUATED = SavedAccuracy()


def html_page(
    report: Report,
    sections: Sequence[PageSection] = (),
    history: History = NO_HISTORY,
    evaluated: SavedAccuracy = NOT_EVALUATED,
) -> str:
    """Return a report as one page that needs no other file, no network and no script; ASCII only.

    Args:
        report: report of a nested file; a stored report lacks some of what the page shows.
        sections: additional sections.
        history: what the log of the run says about its epochs.
        evaluated: accuracy by class that is saved next to the file.
    """
    text = (
        templates()
        .get_template("page.html.j2")
        .render(
            report=report,
            file=PurePosixPath(report.path).name,
            facts=_facts(report),
            levels=report_table(report),
            notes=report_notes(report),
            charts=[chart for chart in (charts.macs_chart(report), charts.bytes_chart(report)) if chart],
            curves=curve_charts(report, history),
            history_problem=history.problem,
            accuracy=evaluated.accuracy,
            accuracy_problem=evaluated.problem,
            worst=worst_classes(report, evaluated.accuracy) if evaluated.accuracy else [],
            geometry={
                "width": charts.WIDTH,
                "height": charts.HEIGHT,
                "frame": charts.FRAME,
                "baseline": BASELINE,
                "font": FONT_SIZE,
            },
            not_evaluated=[level.name for level in report.levels if level.score is None],
            subject=charts.score_subject(report),
            classes=class_groups(report),
            calibration=calibration_table(report),
            bars=bars(report),
            bytes=bytes_table(report),
            tensors=tensor_table(report),
            heat=heat_rows(report),
            sections=[section for section in sections if section.sheets or section.notes],
            recipe=list(settings(report.recipe)),
        )
    )
    return text.encode("ascii", "xmlcharrefreplace").decode()


def bars(report: Report) -> list[Bar]:
    """Return bars of the header and of the levels' own chunks, drawn to the same scale."""
    largest = max(report.header_bytes, *(level.chunk.total for level in report.levels), 1)
    parts = [("header", {"header": report.header_bytes})]
    for level in report.levels:
        chunk = level.chunk
        sizes = {"values": chunk.values, "positions": chunk.positions, "private": chunk.private}
        parts.append((level.name, sizes | {"padding": chunk.padding}))
    return [
        Bar(
            name,
            f"{mebibytes(sum(sizes.values()))} MiB",
            tuple(
                (kind, 100 * size / largest, f"{kind} {size:,} bytes") for kind, size in sizes.items() if size
            ),
        )
        for name, sizes in parts
    ]


def heat_rows(report: Report) -> list[HeatRow]:
    """Return the density of every maskable weight tensor at every level, in the model's order."""
    rows = []
    for layers in zip(*(level.layers for level in report.levels), strict=True):
        name = printable(layers[0].name)
        densities = [layer.kept / layer.weights if layer.weights else None for layer in layers]
        cells = tuple(
            (None, "-") if share is None else (round(100 * min(share, 1.0), 1), f"{share:.3f}")
            for share in densities
        )
        rows.append(HeatRow(name[:-NAME_END], name[-NAME_END:], quantity(layers[0].weights), cells))
    return rows


def class_groups(report: Report) -> list[ClassGroups]:
    """Return the sets of coarser classes, each with the model's classes in its groups."""
    names = report.class_names or [str(index) for index in range(report.num_classes)]
    sets = []
    for classes in report.hierarchy:
        groups: list[tuple[str, list[str]]] = [(name, []) for name in classes.class_names]
        for name, parent in zip(names, classes.parents, strict=True):
            groups[parent][1].append(name)
        levels = [level.name for level in report.levels if level.class_set == classes.name]
        sets.append(ClassGroups(classes.name, levels, groups))
    return sets


def _finalize(value: object) -> object:
    """Return a value as templates print it, before it is escaped; `Markup` comes from a template itself."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _facts(report: Report) -> list[tuple[str, str]]:
    """Return the facts at the top of the page, as pairs of name and value."""
    size = f"{mebibytes(report.file_bytes)} MiB ({report.file_bytes:,} bytes)"
    metric = report.metric
    before = report.original.get(metric.key)
    original = (f"{metric.title} before nesting", "-" if before is None else f"{number(before)} %")
    return [
        ("classes", str(report.num_classes or "none: a backbone")),
        ("input", "x".join(map(str, report.input_size))),
        ("schedule", report.schedule),
        ("levels", str(len(report.levels))),
        ("file", size),
        ("labels", "none were read") if metric.is_comparison else original,
    ]


@cache
def templates() -> Environment:
    """Return the templates of the page, loaded once."""
    return Environment(
        loader=PackageLoader("nestify.report.html"),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
