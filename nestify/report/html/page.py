"""A report as a page of HTML. The numbers are made here, the markup in `templates`.

A file says what it likes: whatever a template prints is escaped, and letters that are not printed, such as
those that turn the direction of a text, are shown by their codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nestify.file.summary import Report
from nestify.report.html import charts
from nestify.report.html.labels import BASELINE, FONT_SIZE
from nestify.report.sheet import Sheet, printable, settings
from nestify.report.table import (
    bytes_table,
    mebibytes,
    number,
    quantity,
    report_notes,
    report_table,
    tensor_table,
    together_table,
)

NAME_END = 14
"""Letters at the end of a layer's name that always show; of the others, what there is room for."""


@dataclass(frozen=True)
class Bar:
    """The bytes of one part of a file.

    Attributes:
        name: of the level, or the header. `text`: its size.
        shares: (kind, percent of the largest part, what it is), one after another.
    """

    name: str
    text: str
    shares: tuple[tuple[str, float, str], ...]


@dataclass(frozen=True)
class HeatRow:
    """The densities of one weight.

    Attributes:
        head, tail: its name in two parts. `weights`: how many it has.
        cells: per level the density in percent, and as text; None where it has no weights.
    """

    head: str
    tail: str
    weights: str
    cells: tuple[tuple[float | None, str], ...]


@dataclass(frozen=True)
class ClassGroups:
    """One set of coarser classes.

    Attributes:
        name: of the set. `levels`: that tell it.
        groups: (coarse class, the model's classes in it).
    """

    name: str
    levels: list[str]
    groups: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class PageSection:
    """Tables that go with a report, and notes on them; nothing where there are neither.

    Attributes:
        key: tells the sections of a page apart.
    """

    key: str
    title: str
    sheets: Sequence[Sheet] = ()
    notes: Sequence[str] = ()


def html_page(report: Report, sections: Sequence[PageSection] = ()) -> str:
    """The report as one page that needs no other file, no network and no script; ASCII letters alone.

    Args:
        report: of a nested file; one that was stored does not have all that a page shows.
        sections: what else the page shows.
    """
    text = (
        _templates()
        .get_template("page.html.j2")
        .render(
            report=report,
            file=PurePosixPath(report.path).name,
            facts=_facts(report),
            levels=report_table(report),
            notes=report_notes(report),
            charts=[chart for chart in (charts.macs_chart(report), charts.bytes_chart(report)) if chart],
            geometry={
                "width": charts.WIDTH,
                "height": charts.HEIGHT,
                "frame": charts.FRAME,
                "baseline": BASELINE,
                "font": FONT_SIZE,
            },
            not_evaluated=[level.name for level in report.levels if level.top1 is None],
            classes=class_groups(report),
            together=together_table(report),
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
    """The header and the levels' own chunks, drawn to the same scale."""
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
    """Density of every maskable weight at every level, the weights in the model's order."""
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
    """The sets of coarser classes, the classes sorted into them."""
    names = report.class_names or [str(index) for index in range(report.num_classes)]
    told = []
    for classes in report.hierarchy:
        groups: list[tuple[str, list[str]]] = [(name, []) for name in classes.class_names]
        for name, parent in zip(names, classes.parents, strict=True):
            groups[parent][1].append(name)
        levels = [level.name for level in report.levels if level.class_set == classes.name]
        told.append(ClassGroups(classes.name, levels, groups))
    return told


def _finalize(value: object) -> object:
    """What a template prints of a value, before it is escaped; markup is what a template made itself."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _facts(report: Report) -> list[tuple[str, str]]:
    """What the page tells first."""
    size = f"{mebibytes(report.file_bytes)} MiB ({report.file_bytes:,} bytes)"
    return [
        ("classes", str(report.num_classes)),
        ("input", "x".join(map(str, report.input_size))),
        ("schedule", report.schedule),
        ("levels", str(len(report.levels))),
        ("file", size),
        (
            "top-1 before nesting",
            f"{number(report.original.get('top1'))} %" if "top1" in report.original else "-",
        ),
    ]


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("nestify.report.html"),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
