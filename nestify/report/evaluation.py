"""Tables and notes of evaluations, picks and gates. No torch here."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nestify.evaluation.gates import GateResult, State, missed
from nestify.file.measurements import INT8
from nestify.recipe.amounts import Limited, show_amount
from nestify.recipe.metric import AGREEMENT, METRICS, TOP1
from nestify.report.bench import conditions
from nestify.report.sheet import Column, Sheet
from nestify.report.table import (
    class_columns,
    interval_columns,
    interval_notes,
    number,
    quantity,
    similarity,
    summarize_images,
    top5_columns,
)

if TYPE_CHECKING:
    from nestify.data.validation import UsedImages
    from nestify.evaluation.evaluate import Evaluation
    from nestify.evaluation.knn import KnnEvaluation
    from nestify.evaluation.measure import Score
    from nestify.evaluation.pick import Pick


def evaluation_sheets(evaluation: "Evaluation") -> list[Sheet]:
    """Return the tables of an evaluation: the levels, and if requested the consensus and the cascade."""
    sheets = [evaluation_table(evaluation)]
    sheets += [consensus_table(evaluation)] if evaluation.consensus else []
    return [*sheets, cascade_table(evaluation)] if evaluation.cascade else sheets


def evaluation_table(evaluation: "Evaluation") -> Sheet:
    """Return what levels are judged by, one row per level."""
    levels, metric = evaluation.levels, evaluation.levels[0].metric
    return Sheet(
        [
            Column("level", [str(result.level) for result in levels], rank=1),
            Column("name", list(evaluation.names), is_text=True),
            *class_columns(evaluation.classes),
            Column(f"{metric.title} %", [number(result.score) for result in levels]),
            *interval_columns([(result.score, result.images) for result in levels], metric),
            *_further_columns(levels, [count for count, _ in evaluation.classes]),
            Column("images", [str(result.images) for result in levels], rank=2),
            Column("images/s", [f"{result.images_per_second:.0f}" for result in levels], rank=5),
        ]
    )


def _further_columns(levels: Sequence["Score"], classes: Sequence[int]) -> list[Column]:
    """Return top-5 and loss, or the similarity of logits, of levels with numbers of classes."""
    metric, columns = levels[0].metric, []
    if metric is AGREEMENT:
        columns.append(
            Column("cosine", [similarity(getattr(result, "cosine", None)) for result in levels], rank=3)
        )
    if metric is TOP1:
        top5 = [getattr(result, "top5", None) for result in levels]
        columns += top5_columns(list(zip(top5, classes, strict=True)), rank=3)
    if "loss" in metric.values:
        columns.append(
            Column("loss", [f"{getattr(result, 'loss', math.nan):.4f}" for result in levels], rank=4)
        )
    return columns


def consensus_table(evaluation: "Evaluation") -> Sheet:
    """Return the accuracy of the consensus of levels 1 to k, one row per k."""
    rows = evaluation.consensus
    columns = [
        Column("consensus of levels", [f"1-{row.level}" for row in rows], is_text=True),
        Column("top-1 %", [number(row.top1) for row in rows]),
        *interval_columns([(row.top1, evaluation.levels[-1].images) for row in rows]),
        *top5_columns([(row.top5, max(count for count, _ in evaluation.classes)) for row in rows], rank=3),
        Column("loss", [f"{row.loss:.4f}" for row in rows], rank=4),
        *_costs([(row.dense_macs, row.effective_macs) for row in rows], evaluation.full_macs),
    ]
    if rows[-1].weights:
        weights = [" ".join(f"{weight:.2f}" for weight in row.weights) for row in rows]
        columns.append(Column("weights", weights, is_text=True, rank=2))
    return Sheet(columns)


def cascade_table(evaluation: "Evaluation") -> Sheet:
    """Return the accuracy and mean cost of cascades, one row per threshold."""
    rows = evaluation.cascade
    shares = [
        Column(f"answered by {name}", [f"{100 * row.shares[k]:.1f} %" for row in rows], rank=2)
        for k, name in enumerate(evaluation.names)
    ]
    return Sheet(
        [
            Column("threshold", [f"{row.threshold:.4g}" for row in rows]),
            Column("top-1 %", [number(row.top1) for row in rows]),
            *interval_columns([(row.top1, evaluation.levels[-1].images) for row in rows]),
            *shares,
            *_costs([(row.dense_macs, row.effective_macs) for row in rows], evaluation.full_macs),
        ]
    )


def evaluation_notes(evaluation: "Evaluation") -> list[str]:
    """Return notes below the tables of an evaluation."""
    notes = [images_note(evaluation.images)]
    scores = [(result.score, result.images) for result in evaluation.levels]
    metric = evaluation.levels[0].metric
    notes += interval_notes(scores, metric)
    if evaluation.reference:
        what = metric.meaning.format(evaluation.reference)
        notes.append(f"Without labels: {what}. It says nothing about whether that is right.")
    elif metric.meaning:
        notes.append(metric.meaning)
    if evaluation.skipped:
        notes.append(f"Skipped {summarize_images(evaluation.skipped)}")
    if evaluation.consensus or evaluation.cascade:
        notes.append(
            "MACs are summed over all levels that run; over full is relative to the highest level alone."
        )
    if evaluation.cascade and any(name for _, name in evaluation.classes):
        notes.append("A cascade's answer is judged in the classes of the level that gave it.")
    if evaluation.cascade and not evaluation.calibrated:
        notes.append(
            "The file holds no temperatures, so a threshold is not the probability of a correct answer; "
            "compress --consensus fits temperatures."
        )
    return notes


def knn_table(evaluation: "KnnEvaluation") -> Sheet:
    """Return the k-NN accuracy of levels, one row per level."""
    levels = evaluation.levels
    return Sheet(
        [
            Column("level", [str(result.level) for result in levels], rank=1),
            Column("name", [result.name for result in levels], is_text=True),
            Column("k-NN %", [number(result.knn) for result in levels]),
            Column("features", [result.features for result in levels], is_text=True, rank=2),
        ]
    )


def knn_notes(evaluation: "KnnEvaluation") -> list[str]:
    """Return notes below the table of k-NN accuracies."""
    held_out = ", held out of the others" if evaluation.held_out else ""
    notes = [
        f"The {evaluation.neighbours} most similar of {evaluation.voting:,} images vote on the class of each "
        f"of {evaluation.images:,} others{held_out}."
    ]
    if any(result.features == "logits" for result in evaluation.levels):
        notes.append(
            "The features of narrower and shallower levels cannot be reached, so their logits are compared; "
            "do not compare these levels with the others."
        )
    return notes + ([f"Skipped {summarize_images(evaluation.skipped)}"] if evaluation.skipped else [])


def images_note(images: "UsedImages") -> str:
    """Return a sentence that says which images an evaluation used."""
    held_out, place = images.held_out, f"{images.total} images of {images.source}"
    count = f"{images.count} of the" if images.count < images.total else "all"
    if held_out is None or (images.trained is None and not images.changed):
        return f"Images: {count} {place}."
    drawn = f"--holdout {held_out.share:g}, seed {held_out.seed}"
    if images.used == "held-out":
        return f"Images: {count} {place}, held out of the training ({drawn}); --all-images uses all of them."
    if images.trained:
        return f"Images: {count} {place}, including those that the levels were trained on ({drawn})."
    return (
        f"Images: {count} {place}. They are not, or no longer, the {held_out.images} images that validation "
        f"images were held out of ({drawn}), so the levels may have been trained on some of them."
    )


def _costs(
    macs: Sequence[tuple[float | None, float | None]], full: tuple[int | None, int | None]
) -> list[Column]:
    """Return columns of dense and effective MACs, absolute and relative to the highest level.

    Args:
        macs: (dense, effective) MACs of each row; None if not known.
        full: (dense, effective) MACs of the highest level; None if not known.
    """
    titles = (("dense MACs", 5), ("effective MACs", 1))
    columns = []
    for (title, rank), values, highest in zip(titles, zip(*macs, strict=True), full, strict=True):
        counts = [quantity(None if value is None else round(value)) for value in values]
        over = ["-" if value is None or not highest else f"{value / highest:.2f}" for value in values]
        columns += [Column(title, counts, rank=rank + 1), Column(f"{title} over full", over, rank=rank)]
    return columns


TITLES: dict[Limited, str] = {
    "latency": "median latency",
    "bytes": "prefix bytes",
    "macs": "dense MACs",
    "params": "non-zero parameters",
    "top1": "top-1",
}


def pick_table(pick: "Pick") -> Sheet:
    """Return the levels with their values and the limits they miss, one row per level.

    Values without a limit are left out first where room is short.
    """
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
    """Return a note on the measurement that the latencies come from; none without latencies."""
    if pick.measurement is None:
        return []
    notes = [f"{conditions([pick.measurement])}, batch {pick.measurement.batch_size}"]
    if pick.measurement.dtype == INT8:
        notes.append("The latency is that of int8, the top-1 that of float32.")
    return notes


_FORMATS: dict[str, Callable[[float], str]] = {
    **{metric.gate: lambda value: f"{number(value)} %" for metric in METRICS},
    "max_drop": lambda value: f"{number(value)} points",
    "max_regression": lambda value: f"{number(value)} points",
}


def gates_table(results: Sequence[GateResult]) -> Sheet:
    """Return the limits and the levels' values, one row per limit; gates have their names in TOML."""
    return Sheet(
        [
            Column("level", [str(result.level) for result in results], rank=1),
            Column("name", [result.name for result in results], is_text=True),
            Column("gate", [result.gate for result in results], is_text=True),
            Column("limit", [_show(result, result.limit) for result in results]),
            Column("value", [_show(result, result.value) for result in results]),
            Column("result", [_STATES[result.state] for result in results], is_text=True),
        ]
    )


def _show(result: GateResult, value: float | None) -> str:
    return "not known" if value is None else _FORMATS.get(result.gate, "{:,.0f}".format)(value)


_STATES: dict[State, str] = {"met": "ok", "missed": "MISSED", "not compared": "not compared"}


def missed_gates(results: Sequence[GateResult]) -> str:
    """Return the missed gates with their levels, values and limits, as a list in a sentence."""
    return "; ".join(
        f"{result.gate} of level {result.level} ({result.name}): {_show(result, result.value)}, limit "
        f"{_show(result, result.limit)}"
        for result in missed(results)
    )
