"""Tables and notes of reports, plans and verifications. No torch here."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from nestify.file.summary import LevelReport, Report
from nestify.recipe.metric import AGREEMENT, METRICS, TOP1, Metric, metric_of
from nestify.report.bench import engine_notes
from nestify.report.sheet import Column, Sheet

if TYPE_CHECKING:
    from nestify.evaluation.verify import Verification


def report_title(report: Report) -> str:
    """Return the first line of a report: the model, its classes and the size of its input."""
    predicts = f"{report.num_classes} classes" if report.num_classes else "backbone"
    return f"{report.architecture}, {predicts}, input {'x'.join(map(str, report.input_size))}"


def report_table(report: Report) -> Sheet:
    """Return the levels of a report, one row per level."""
    levels = report.levels
    columns = [
        Column("level", [str(level.level) for level in levels], rank=2),
        Column("name", [level.name for level in levels], is_text=True),
        *size_columns([(level.sparsity, level.width, level.depth) for level in levels]),
        *class_columns([(level.classes, level.class_set) for level in levels]),
    ]
    if any(level.feature_channels for level in levels):
        channels = [" ".join(map(str, level.feature_channels)) for level in levels]
        columns.append(Column("feature channels", channels, is_text=True, rank=2))
    if any(is_patterned(level.pattern) for level in levels):
        patterns = [level.pattern if level.sparsity else "-" for level in levels]
        columns.append(Column("pattern", patterns, is_text=True, rank=3))
    columns += [
        Column("parameters", [quantity(level.parameters) for level in levels], rank=8),
        Column("non-zero", [quantity(level.nonzero_parameters) for level in levels], rank=1),
        Column("dense MACs", [quantity(level.dense_macs) for level in levels], rank=4),
        Column("effective MACs", [quantity(level.effective_macs) for level in levels], rank=5),
        Column("prefix MiB", [mebibytes(level.prefix_bytes) for level in levels]),
    ]
    for metric in METRICS:
        columns += _score_columns(levels, metric)
    return Sheet(columns)


def _score_columns(levels: Sequence[LevelReport], metric: Metric) -> list[Column]:
    """Return the columns of the levels that are judged by a metric; none if there are none."""

    def of_each(find: Callable[[LevelReport], float | None]) -> list[float | None]:
        return [find(level) if metric_of(level) is metric else None for level in levels]

    columns, scores, before = [], of_each(metric.score), of_each(metric.score_before)
    if any(score is not None for score in scores):
        columns.append(Column(f"{metric.title} %", list(map(number, scores))))
        columns += interval_columns(
            [(score, level.images) for score, level in zip(scores, levels, strict=True)], metric
        )
        if metric is TOP1:
            columns += top5_columns([(level.top5, level.classes) for level in levels], rank=7)
        if metric is AGREEMENT:
            columns.append(Column("cosine", [similarity(level.cosine) for level in levels], rank=7))
    if any(score is not None for score in before):
        columns.append(Column(f"untrained {metric.title} %", list(map(number, before)), rank=6))
    return columns


def report_notes(report: Report) -> list[str]:
    """Return notes below the table of a report."""
    notes, metric = [], report.metric
    if metric.key in report.original:
        notes.append(f"The dense model before nesting: {metric.title} {report.original[metric.key]:.2f} %.")
    if metric.is_comparison:
        what = metric.meaning.format("the original model")
        notes.append(f"Learned without labels: {what}. Accuracy was not measured.")
    elif metric.meaning:
        notes.append(metric.meaning)
    notes += engine_notes(report)
    if any(level.width < 1 or level.depth < 1 for level in report.levels):
        notes.append(
            "A narrower or shallower level is a smaller network: dense kernels execute its dense MACs."
        )
    if any(level.class_set for level in report.levels):
        notes.append("Each level has its own classifier, and its accuracy is measured over its own classes.")
    if report.added_levels:
        notes.append(
            f"Levels added later, around those below them (nestify extend): {', '.join(report.added_levels)}."
        )
    notes += interval_notes([(level.score, level.images) for level in report.levels], metric)
    if report.uncounted:
        unknown = ", ".join(f"{name} ({count} x)" for name, count in report.uncounted.items())
        notes.append(f"MACs do not include these unknown operators: {unknown}.")
    return notes


def layer_table(report: Report) -> Sheet:
    """Return the density of every maskable weight tensor at every level, one row per tensor."""
    first = report.levels[0].layers
    columns = [
        Column("weight", [layer.name for layer in first], is_text=True),
        Column("weights", [quantity(layer.weights) for layer in first], rank=1),
        Column("dense MACs", [quantity(layer.dense_macs) for layer in first], rank=2),
    ]
    for level in report.levels:
        densities = [f"{layer.kept / layer.weights:.4f}" if layer.weights else "-" for layer in level.layers]
        columns.append(Column(f"density {level.name}", densities))
    return Sheet(columns)


def verification_table(verification: "Verification") -> Sheet:
    """Return the results of a verification, one row per level."""
    levels = verification.levels
    return Sheet(
        [
            Column("level", [str(level.level) for level in levels], rank=1),
            Column("name", [level.name for level in levels], is_text=True),
            Column("prefix MiB", [mebibytes(level.prefix_bytes) for level in levels], rank=2),
            Column("weights", [quantity(level.weights) for level in levels], rank=3),
            Column("logits off by", ["-" if v.off is None else f"{v.off:.1e}" for v in levels], rank=4),
            Column("result", ["ok" if level.problem is None else "FAILED" for level in levels], is_text=True),
        ]
    )


def verification_notes(verification: "Verification") -> list[str]:
    """Return a note on each level that failed."""
    return [
        f"Level {level.level} ({level.name}): {level.problem}"
        for level in verification.levels
        if level.problem is not None
    ]


def size_columns(levels: Sequence[tuple[float, float, float]]) -> list[Column]:
    """Return columns of sparsity, width and depth, without those in which every level is full.

    Sparsity stays if no other column does.

    Args:
        levels: (sparsity, width, depth) of each level.
    """
    sparsities, widths, depths = zip(*levels, strict=True)
    columns = [
        Column(name, [f"{share:.4g}" for share in shares], rank=1)
        for name, shares in (("width", widths), ("depth", depths))
        if min(shares) < 1
    ]
    if max(sparsities) > 0 or not columns:
        columns.insert(0, Column("sparsity", [f"{sparsity:.4f}" for sparsity in sparsities], rank=1))
    return columns


def class_columns(levels: Sequence[tuple[int, str]]) -> list[Column]:
    """Return a column of the classes that each level predicts, if some levels predict coarser classes.

    Args:
        levels: number of classes of each level, and the name of the class set; empty for the model's own.
    """
    if not any(name for _, name in levels):
        return []
    cells = [f"{count} {name}".rstrip() for count, name in levels]
    return [Column("classes", cells, is_text=True, rank=2)]


FEW_IMAGES = 100
"""Accuracies that were measured on fewer images are shown with their interval."""

FEW_CLASSES = 10
"""Top-5 is not shown of levels that predict fewer classes, where guessing is often right."""


def top5_columns(levels: Sequence[tuple[float | None, int]], rank: int) -> list[Column]:
    """Return a column of top-5 accuracies, if a level predicts enough classes for it to mean something.

    Args:
        levels: top-5 accuracy in percent and number of classes of each level.
        rank: rank of the column.
    """
    cells = [number(None if classes < FEW_CLASSES else top5) for top5, classes in levels]
    return [Column("top-5 %", cells, rank=rank)] if any(cell != "-" for cell in cells) else []


def interval_columns(
    levels: Sequence[tuple[float | None, int | None]], metric: Metric = TOP1
) -> list[Column]:
    """Return a column of the intervals of scores, if some were measured on few images.

    Args:
        levels: score in percent, and number of images of each level.
        metric: what the scores are; only shares of the images have an interval.
    """
    intervals = [_interval(score, images) for score, images in levels if metric.counts_images]
    if all(each == "-" for each in intervals):
        return []
    return [Column(f"{metric.title} interval", intervals, rank=1)]


def interval_notes(levels: Sequence[tuple[float | None, int | None]], metric: Metric = TOP1) -> list[str]:
    """Return a note on intervals, if some scores were measured on few images."""
    few = sorted({images for top1, images in levels if images and _interval(top1, images) != "-"})
    if not few or not metric.counts_images:
        return []
    count = " or ".join(map(str, few)) + (" image" if few == [1] else " images")
    return [
        f"{metric.title.capitalize()} was measured on only {count}; its interval is the 95 % confidence "
        "interval (Wilson score)."
    ]


def _interval(top1: float | None, images: int | None) -> str:
    """Return the 95 % Wilson score interval (1927, equation 1) of an accuracy on few images: `81.4-99.8`."""
    if top1 is None or not images or images >= FEW_IMAGES:
        return "-"
    share, z2 = top1 / 100, 1.959964**2
    center = (share + z2 / (2 * images)) / (1 + z2 / images)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * images)) / images) / (1 + z2 / images)
    return f"{100 * max(0.0, center - half):.1f}-{100 * min(1.0, center + half):.1f}"


def is_patterned(pattern: str) -> bool:
    return pattern != "unstructured"


def level_word(number: int, name: str) -> str:
    """Return how commands name a level: its name if that is a plain word, and else its number (`level2`)."""
    return name if re.fullmatch(r"[A-Za-z]\w{0,63}", name, re.ASCII) else f"level{number}"


def quantity(value: int | None) -> str:
    """Format a count with three digits and a suffix: 25.6M; None is a dash."""
    if value is None:
        return "-"
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return str(value)


def mebibytes(size: int) -> str:
    """Format bytes as MiB."""
    return f"{size / 2**20:.2f}"


def number(value: float | None) -> str:
    """Format a percentage; None, which was not measured, is a dash."""
    return "-" if value is None else f"{value:.2f}"


def similarity(value: float | None) -> str:
    """Format a cosine similarity; None, which was not measured, is a dash."""
    return "-" if value is None else f"{value:.4f}"


def summarize_images(names: Iterable[str]) -> str:
    """Return the number of unreadable images, and the names of the first three."""
    names = list(names)
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} unreadable image{'s' * (len(names) != 1)}: {', '.join(names[:3])}{more}"


LARGEST = 12
"""Number of tensors with a row of their own; the remaining ones share a row."""


def bytes_table(report: Report) -> Sheet:
    """Return the bytes of the header and of each level's own chunk, one row per part."""
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
    """Return the bytes of the largest tensors in each level's chunk, one row per tensor.

    A tensor's bytes are its values, their positions, and the levels' own copies.
    """
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


def calibration_table(report: Report) -> Sheet | None:
    """Return temperatures and consensus weights, one row per level; None if none were fitted."""
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
