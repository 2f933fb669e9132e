"""Tables and notes of measured latencies. No torch here."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from nestify.exports.target import INT8_PATTERN
from nestify.file.measurements import INT8, TORCH, LevelLatency, Measurement
from nestify.file.summary import LevelReport, Report
from nestify.report.sheet import Column, Sheet

Row = tuple[Measurement, LevelLatency]

ONLY_ON_ENGINE = "Masked weights save time only on the sparse engine: nestify bench --engine"


def bench_sheets(report: Report, measurements: Sequence[Measurement]) -> list[Sheet]:
    """Return one table per machine, runtime and dtype, with one row per measurement and level.

    Args:
        report: report of the measured file.
        measurements: latencies of the file's levels.
    """
    ordered = sorted(
        measurements,
        key=lambda m: (
            m.machine.model_dump_json(),
            m.runtime != TORCH,
            m.runtime,
            m.dtype,
            m.threads,
            m.batch_size,
        ),
    )
    groups = groupby(ordered, key=lambda m: (m.machine, m.runtime, m.dtype))
    return [_sheet(report, list(group)) for _, group in groups]


def masked_notes(report: Report, measurements: Sequence[Measurement]) -> list[str]:
    """Return a note on levels that only mask weights, which take as long in torch; none if there are none."""
    names = dict.fromkeys(
        level.name
        for measurement, level in _rows(measurements)
        if measurement.runtime == TORCH and _only_masks(report, report.levels[level.level - 1])
    )
    if not names:
        return []
    return [
        f"{ONLY_ON_ENGINE}. Dense kernels multiply with the zeros, and {', '.join(names)} should take about "
        "as long as the full level."
    ]


def int8_notes(report: Report, measurements: Sequence[Measurement]) -> list[str]:
    """Return a note on measurements in int8: what they do not show, and which sparse levels ran dense."""
    rows = [(measurement, level) for measurement, level in _rows(measurements) if measurement.dtype == INT8]
    if not rows:
        return []
    levels = [report.levels[number - 1] for number in sorted({level.level for _, level in rows})]
    dense = [level.name for level in levels if level.sparsity > 0 and level.pattern != INT8_PATTERN]
    notes = ["All levels ran in int8, the full one too; nestify eval --engine --int8 measures accuracy."]
    if dense:
        notes.append(
            f"In int8 the engine packs sparse layers of pattern {INT8_PATTERN} alone: those of "
            f"{', '.join(dense)} ran dense."
        )
    return notes


def engine_notes(report: Report) -> list[str]:
    """Return a note on the time that masked weights save; none if no level masks weights.

    It names the levels that measurements next to the file show to be faster on the sparse engine.
    """
    if not any(level.sparsity > 0 for level in report.levels):
        return []
    best: dict[int, Row] = {}
    for measurement, level in _rows(report.measured):
        faster = (
            measurement.on_engine
            and report.levels[level.level - 1].sparsity > 0
            and level.over_full_quartiles[1] < 1
        )
        if faster and (level.level not in best or level.over_full < best[level.level][1].over_full):
            best[level.level] = measurement, level
    if not best:
        return [f"{ONLY_ON_ENGINE}. Dense kernels execute the dense MACs."]
    shares = ", ".join(
        f"{level.name} {level.over_full:.2f} (batch {measurement.batch_size}, "
        f"{measurement.threads} thread{'s' * (measurement.threads != 1)}"
        f"{', both in int8' * (measurement.dtype == INT8)})"
        for _, (measurement, level) in sorted(best.items())
    )
    return [
        "Masked weights save time on the sparse engine only. Measured there, as shares of the full level's "
        f"time: {shares}. Dense kernels execute the dense MACs at every level."
    ]


def noise_notes(report: Report, measurements: Sequence[Measurement]) -> list[str]:
    """Return notes on what the ratios mean, and on levels whose ratio is within the noise."""
    full = len(report.levels)
    rows = [row for row in _rows(measurements) if row[1].level < full]
    unclear = [
        f"{level.name} (batch {measurement.batch_size})"
        for measurement, level in rows
        if not (measurement.runtime == TORCH and _only_masks(report, report.levels[level.level - 1]))
        and level.over_full_quartiles[0] <= 1 <= level.over_full_quartiles[1]
    ]
    notes = []
    if rows:
        notes.append(
            "Latency over full is the median of the ratios of the rounds, in which levels take turns."
        )
    if unclear:
        notes.append(
            f"Within the noise of the full level: {', '.join(unclear)}; the middle half of the ratios "
            "includes 1."
        )
    return notes


def bench_document(report: Report, measurement: Measurement) -> dict[str, Any]:
    """Return a measurement as plain JSON values, with throughput and share of dense MACs per level."""
    document = measurement.model_dump(mode="json")
    for entry, level in zip(document["levels"], measurement.levels, strict=True):
        entry["images_per_second"] = measurement.images_per_second(level)
        entry["dense_macs_over_full"] = _macs_over_full(report, level.level)
    return document


def _sheet(report: Report, measurements: Sequence[Measurement]) -> Sheet:
    rows = _rows(measurements)
    macs = [_macs_over_full(report, level.level) for _, level in rows]
    columns = [
        Column("level", [str(level.level) for _, level in rows], rank=3),
        Column("name", [level.name for _, level in rows], is_text=True),
        Column("batch", [str(measurement.batch_size) for measurement, _ in rows]),
    ]
    if len({measurement.threads for measurement in measurements}) > 1:
        columns.append(Column("threads", [str(measurement.threads) for measurement, _ in rows]))
    columns += [
        Column("median ms", [milliseconds(level.median_seconds) for _, level in rows]),
        Column("p95 ms", [milliseconds(level.p95_seconds) for _, level in rows], rank=4),
        Column("images/s", [_rate(m.images_per_second(level)) for m, level in rows], rank=2),
        Column("dense MACs over full", ["-" if share is None else f"{share:.3f}" for share in macs], rank=1),
        Column("latency over full", [f"{level.over_full:.3f}" for _, level in rows]),
        Column("quartiles of ratio", [_quartiles(report, level) for _, level in rows], rank=5),
    ]
    return Sheet(columns, conditions(measurements))


def conditions(measurements: Sequence[Measurement]) -> str:
    """Return a line that says on what machine, how and when measurements were made.

    Args:
        measurements: measurements of one machine, runtime and dtype.
    """
    machine, dtype, runtime = measurements[0].machine, measurements[0].dtype, measurements[0].runtime
    ran_by = f"torch {machine.torch}" if runtime == TORCH else runtime
    accelerator = "" if machine.device == "cpu" else f"{machine.device} ({machine.device_name}), "
    threads = {measurement.threads for measurement in measurements}
    together = f"{min(threads)} thread{'s' * (threads != {1})}, " if len(threads) == 1 else ""
    rounds = sorted({measurement.rounds for measurement in measurements})
    dates = sorted({measurement.date[:10] for measurement in measurements})
    return (
        f"Measured on {accelerator}{machine.cpu}, {machine.cores} cores, {machine.system}: {together}"
        f"{dtype}, {ran_by}, {_span(rounds)} rounds, {_span(dates)}"
    )


def _span(values: Sequence[object]) -> str:
    return " to ".join(str(value) for value in dict.fromkeys((values[0], values[-1])))


def _rows(measurements: Sequence[Measurement]) -> list[Row]:
    return [(measurement, level) for measurement in measurements for level in measurement.levels]


def _macs_over_full(report: Report, level: int) -> float | None:
    own, full = report.levels[level - 1].dense_macs, report.levels[-1].dense_macs
    return None if own is None or not full else own / full


def _quartiles(report: Report, level: LevelLatency) -> str:
    first, third = level.over_full_quartiles
    return "-" if level.level == len(report.levels) else f"{first:.3f}-{third:.3f}"


def _only_masks(report: Report, level: LevelReport) -> bool:
    """Return whether a level differs from the full level only by masked weights."""
    full = report.levels[-1]
    return (
        level.level < full.level
        and level.sparsity > 0
        and (level.width, level.depth) == (full.width, full.depth)
    )


def milliseconds(seconds: float) -> str:
    """Format seconds as ms, with at least three digits."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
