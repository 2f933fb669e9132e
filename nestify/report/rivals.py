"""Tables and notes of levels measured next to other runtimes. No torch here."""

from typing import TYPE_CHECKING, Any

from nestify.report.bench import milliseconds
from nestify.report.sheet import Column, Sheet

if TYPE_CHECKING:
    from nestify.evaluation.rivals import Match, Rivals

REFERENCES = ("float32", "int8")
"""Types of the dense networks whose fastest one is compared with."""


def rivals_sheets(rivals: "Rivals") -> list[Sheet]:
    """Return one table per number of threads and batch size, with one row per contender."""
    return [_sheet(rivals, match) for match in rivals.matches]


def rivals_notes(rivals: "Rivals") -> list[str]:
    """Return notes on what the ratios mean, how int8 models were made, and what could not run."""
    return [
        "Times are the 25th percentile of rounds in which all take turns; spread is the 75th over the 25th. "
        "Ratios are to the fastest dense full level in float32 and in int8.",
        f"int8 is quantised per channel and calibrated on {rivals.calibration}; check its accuracy before "
        "you compare.",
        *rivals.skipped,
    ]


def rivals_document(rivals: "Rivals") -> dict[str, Any]:
    """Return the times as plain JSON values, with their ratios."""
    levels = rivals.report.levels
    return {
        "machine": rivals.machine.model_dump(mode="json"),
        "calibration": rivals.calibration,
        "skipped": list(rivals.skipped),
        "matches": [
            {
                "threads": match.threads,
                "batch_size": match.batch_size,
                "rounds": match.rounds,
                "contenders": [
                    {
                        "level": timing.contender.level,
                        "name": levels[timing.contender.level - 1].name,
                        "runtime": timing.contender.runtime,
                        "dtype": timing.contender.dtype,
                        "p25_seconds": timing.p25_seconds,
                        "p75_seconds": timing.p75_seconds,
                        **{
                            f"over_best_{dtype}": match.over_best(timing, dtype, len(levels))
                            for dtype in REFERENCES
                        },
                    }
                    for timing in match.timings
                ],
            }
            for match in rivals.matches
        ],
    }


def _sheet(rivals: "Rivals", match: "Match") -> Sheet:
    levels, timings = rivals.report.levels, match.timings
    machine = rivals.machine
    columns = [
        Column("level", [str(each.contender.level) for each in timings], rank=3),
        Column("name", [levels[each.contender.level - 1].name for each in timings], is_text=True),
        Column("runtime", [each.contender.runtime for each in timings], is_text=True),
        Column("dtype", [each.contender.dtype for each in timings], is_text=True),
        Column("ms", [milliseconds(each.p25_seconds) for each in timings]),
        Column("spread", [f"{each.p75_seconds / each.p25_seconds:.2f}" for each in timings], rank=2),
    ]
    for dtype in REFERENCES:
        ratios = [match.over_best(each, dtype, len(levels)) for each in timings]
        cells = ["-" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
        columns.append(Column(f"over {dtype}", cells))
    title = (
        f"Measured on {machine.cpu}, {machine.cores} cores, {machine.system}: {match.threads} "
        f"thread{'s' * (match.threads != 1)}, batch {match.batch_size}, {match.rounds} rounds"
    )
    return Sheet(columns, title)
