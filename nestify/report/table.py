"""Reports, plans and evaluations as tables, for a terminal or as Markdown. No torch here."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from nestify.report.document import Report

if TYPE_CHECKING:
    from nestify.api import Evaluation
    from nestify.planning import Plan

Column = tuple[str, Sequence[str]]


def report_table(report: Report, *, markdown: bool = False) -> Table:
    """The levels of a report, one row each."""
    levels = report.levels
    columns: list[Column] = [
        ("level", [str(level.level) for level in levels]),
        ("name", [level.name for level in levels]),
        ("sparsity", [f"{level.sparsity:.4f}" for level in levels]),
        ("parameters", [quantity(level.parameters) for level in levels]),
        ("non-zero", [quantity(level.nonzero_parameters) for level in levels]),
        ("dense MACs", [quantity(level.dense_macs) for level in levels]),
        ("effective MACs", [quantity(level.effective_macs) for level in levels]),
        ("prefix MiB", [mebibytes(level.prefix_bytes) for level in levels]),
    ]
    if any(level.top1 is not None for level in levels):
        columns += [
            ("top-1 %", [number(level.top1) for level in levels]),
            ("top-5 %", [number(level.top5) for level in levels]),
        ]
    if any(level.top1_before is not None for level in levels):
        columns.append(("untrained top-1 %", [number(level.top1_before) for level in levels]))
    if any(level.pattern != "unstructured" for level in levels):
        columns.insert(3, ("pattern", [level.pattern for level in levels]))
    return _table(columns, markdown, text_columns=("name", "pattern"))


def report_notes(report: Report) -> list[str]:
    """What the numbers of a report do not say by themselves."""
    notes = []
    if report.original:
        notes.append(f"The dense model before nesting: top-1 {report.original['top1']:.2f} %.")
    if any(level.sparsity > 0 for level in report.levels):
        notes.append(
            "Masked weights save bytes, not time: dense kernels execute the dense MACs at every level, "
            "and effective MACs are theory."
        )
    if report.uncounted:
        unknown = ", ".join(f"{name} ({count} x)" for name, count in report.uncounted.items())
        notes.append(f"MACs leave out operators that are not known: {unknown}.")
    return notes


def layer_table(report: Report, *, markdown: bool = False) -> Table:
    """Density of every maskable weight at every level, one row each."""
    first = report.levels[0].layers
    columns: list[Column] = [
        ("weight", [layer.name for layer in first]),
        ("weights", [quantity(layer.weights) for layer in first]),
        ("dense MACs", [quantity(layer.dense_macs) for layer in first]),
    ]
    for level in report.levels:
        densities = [f"{layer.kept / layer.weights:.4f}" if layer.weights else "-" for layer in level.layers]
        columns.append((f"density {level.name}", densities))
    return _table(columns, markdown, text_columns=("weight",))


def plan_table(plan: "Plan") -> Table:
    """The levels of a plan, one row each."""
    levels = plan.levels
    columns: list[Column] = [
        ("level", [str(k) for k in range(1, len(levels) + 1)]),
        ("name", [level.level.name for level in levels]),
        ("sparsity", [f"{level.sparsity:.4f}" for level in levels]),
        ("pattern", [str(level.level.pattern) for level in levels]),
        ("non-zero", [quantity(level.nonzero_parameters) for level in levels]),
        ("dense MACs", [quantity(level.dense_macs) for level in levels]),
        ("effective MACs", [quantity(level.effective_macs) for level in levels]),
        ("data MiB", [mebibytes(level.data_bytes) for level in levels]),
    ]
    return _table(columns, False, text_columns=("name", "pattern"))


def evaluation_table(evaluation: "Evaluation") -> Table:
    """Accuracy of levels, one row each."""
    levels = evaluation.levels
    columns: list[Column] = [
        ("level", [str(result.level) for result in levels]),
        ("name", list(evaluation.names)),
        ("top-1 %", [number(result.top1) for result in levels]),
        ("top-5 %", [number(result.top5) for result in levels]),
        ("loss", [f"{result.loss:.4f}" for result in levels]),
        ("images", [str(result.images) for result in levels]),
        ("images/s", [f"{result.images_per_second:.0f}" for result in levels]),
    ]
    return _table(columns, False, text_columns=("name",))


def _table(columns: Sequence[Column], markdown: bool, text_columns: Sequence[str]) -> Table:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, show_edge=markdown, pad_edge=markdown)
    for title, _ in columns:
        align = "left" if title in text_columns else "right"
        table.add_column(title, justify=align, no_wrap=True)  # type: ignore[arg-type]
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table


def quantity(value: int | None) -> str:
    """A count with three digits and a power of ten: 25.6M."""
    if value is None:
        return "-"
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return str(value)


def mebibytes(size: int) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:.2f}"


def number(value: float | None) -> str:
    """A percentage, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.2f}"
