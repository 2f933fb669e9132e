"""Where the bytes of a file are, and what its levels know of each other, as tables. No torch here."""

from collections import Counter

from nestify.file.summary import Report
from nestify.report.sheet import Column, Sheet

LARGEST = 12
"""Tensors that are named; the others are summed up."""


def bytes_table(report: Report) -> Sheet:
    """Bytes of the header and of each level's own chunk, one row each."""
    chunks = [level.chunk for level in report.levels]
    totals = [report.header_bytes, *(chunk.total for chunk in chunks)]
    parts = {
        "values": [chunk.values for chunk in chunks],
        "positions": [chunk.positions for chunk in chunks],
        "the level's own": [chunk.private for chunk in chunks],
        "padding": [chunk.padding for chunk in chunks],
    }
    return Sheet(
        [
            Column("part", ["header", *(level.name for level in report.levels)], is_text=True),
            Column("bytes", [f"{total:,}" for total in totals]),
            Column("% of the file", [_percent(total, report) for total in totals]),
            *(Column(name, ["-", *(f"{size:,}" for size in sizes)]) for name, sizes in parts.items()),
        ]
    )


def tensor_table(report: Report) -> Sheet:
    """Bytes of the largest tensors in each level's chunk, values, positions and copies of the levels' own."""
    totals: Counter[str] = Counter()
    for level in report.levels:
        totals.update(level.tensors)
    named = [name for name, _ in totals.most_common(LARGEST)]
    others = [name for name in totals if name not in named]
    columns = [
        Column("tensor", [*named, *([f"{len(others)} others"] if others else [])], is_text=True),
    ]
    for title, held in [*((level.name, level.tensors) for level in report.levels), ("all levels", totals)]:
        sizes = [held.get(name, 0) for name in named]
        if others:
            sizes.append(sum(held.get(name, 0) for name in others))
        columns.append(Column(title, [f"{size:,}" for size in sizes]))
        if held is totals:
            columns.append(Column("% of the file", [_percent(size, report) for size in sizes]))
    return Sheet(columns)


def together_table(report: Report) -> Sheet | None:
    """Temperatures and consensus weights, one row per level; None where nothing was fitted."""
    levels = report.levels
    if not any(level.temperature is not None or level.consensus for level in levels):
        return None
    temperatures = ["-" if level.temperature is None else f"{level.temperature:.3f}" for level in levels]
    columns = [
        Column("level", [level.name for level in levels], is_text=True),
        Column("temperature", temperatures),
    ]
    for index, lower in enumerate(levels):
        weights = [level.consensus[index] if index < len(level.consensus) else None for level in levels]
        if any(weight is not None for weight in weights):
            cells = ["-" if weight is None else f"{weight:.3f}" for weight in weights]
            columns.append(Column(f"weight of {lower.name}", cells))
    return Sheet(columns)


def _percent(size: int, report: Report) -> str:
    return f"{100 * size / report.file_bytes:.2f}"
