"""Levels held against limits as a table. No torch here."""

from typing import TYPE_CHECKING

from nestify.recipe.amounts import Limited, show_amount
from nestify.report.bench import conditions
from nestify.report.sheet import Column, Sheet

if TYPE_CHECKING:
    from nestify.evaluate.pick import Pick

TITLES: dict[Limited, str] = {
    "latency": "median latency",
    "bytes": "prefix bytes",
    "macs": "dense MACs",
    "params": "non-zero parameters",
    "top1": "top-1",
}


def pick_table(pick: "Pick") -> Sheet:
    """All levels, one row each: what is limited of them, the rest where there is room, and what they miss."""
    candidates = pick.candidates
    limited = {limit.limited for limit in pick.limits}
    columns = [
        Column("level", [str(candidate.level) for candidate in candidates], rank=9),
        Column("name", [candidate.name for candidate in candidates], is_text=True),
    ]
    for rank, (key, title) in enumerate(TITLES.items(), start=1):
        values = [candidate.values[key] for candidate in candidates]
        if any(value is not None for value in values):
            cells = ["-" if value is None else show_amount(key, value) for value in values]
            columns.append(Column(title, cells, rank=0 if key in limited else rank))
    missed = [", ".join(limit.option for limit in candidate.missed) for candidate in candidates]
    picked = pick.level.level if pick.level else None
    results = [
        f"misses {options}" if options else "picked" if candidate.level == picked else "meets all"
        for candidate, options in zip(candidates, missed, strict=True)
    ]
    return Sheet([*columns, Column("result", results, is_text=True)])


def pick_notes(pick: "Pick") -> list[str]:
    """Where the latencies are from."""
    if pick.measurement is None:
        return []
    return [f"{conditions([pick.measurement])}, batch {pick.measurement.batch_size}"]
