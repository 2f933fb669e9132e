"""Training curves, loss and top-1 by epoch, as coordinates that a template draws. Pure arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from nestify.file.history import History, TrainingEpoch
from nestify.file.summary import Report
from nestify.report.html.charts import FRAME, INSET, MOST_TICKS, Scale, Tick, percent_ticks, round_ticks
from nestify.report.html.labels import CELL, LINE, Box, Label, shorten

MOST_MARKS = 40
"""Maximum number of points of a curve that have marks; a longer curve is a line alone."""
SMALLEST_LOSS = 1e-3
"""Least value at the top of an axis of losses."""
MOST_LABELS = int((FRAME.bottom - FRAME.top) // LINE)
"""Maximum number of labels below each other."""

Points = Sequence[tuple[int, float]]
"""Pairs of an epoch and a value."""


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        points: positions (x, y).
        texts: one text per point, shown when the pointer is over its mark; empty if there are no marks.
        share: position of the level among the levels, in percent: 0 for the core, 100 for the full level.
        width: width of the line. Lower levels have wider lines and are drawn first, so that each of several
            equal curves can be seen.
    """

    points: tuple[tuple[float, float], ...]
    texts: tuple[str, ...]
    share: float
    width: float


@dataclass(frozen=True)
class CurveChart:
    """Curves of the levels over the epochs.

    Attributes:
        key: unique name of the chart on its page.
        title: title of the chart.
        x_title: quantity of the x axis.
        y_title: quantity of the y axis.
        x: the x axis.
        y: the y axis.
        curves: curves in drawing order, core first.
        labels: names of the levels at the ends of their curves.
        unlabelled: number of curves without a label, because there is no room for it.
        description: the chart in words, for screen readers.
    """

    key: str
    title: str
    x_title: str
    y_title: str
    x: Scale
    y: Scale
    curves: tuple[Curve, ...]
    labels: tuple[Label, ...]
    unlabelled: int
    description: str


def curve_charts(report: Report, history: History) -> list[CurveChart]:
    """Return the charts of a history: training and validation, and the fine-tuning if there was one.

    Charts without any value are left out, and all of them if no level was trained.
    """
    names = [level.name for level in report.levels]
    last = max((line.epoch for line in history.training), default=0)
    scores = [  # the evaluation after a part of an epoch has the number of the whole epochs before it
        (last if line.moment == "after" else line.epoch, {score.level: score for score in line.levels})
        for line in history.validation
    ]
    losses, scored = [], []
    title = report.metric.title
    for level in range(1, len(names) + 1):
        found = {epoch: levels[level] for epoch, levels in scores if level in levels}
        losses.append([(epoch, score.loss) for epoch, score in found.items() if score.loss is not None])
        scored.append([(epoch, score.score) for epoch, score in found.items() if score.score is not None])
    dense = ["dense model"]
    finetuned = _scores(history.finetuning, 1, "top-1")
    made = [
        _chart("finetune-loss", "Fine-tuning: loss", dense, *_losses(history.finetuning, 1)),
        _chart("finetune-top1", "Fine-tuning: top-1 on training images", dense, *finetuned),
    ]
    if history.training:
        made += [
            _chart("train-loss", "Training: loss", names, *_losses(history.training, len(names))),
            _chart("train-top1", f"Training: {title}", names, *_scores(history.training, len(names), title)),
            _chart("validation-loss", "Validation: loss", names, "loss", losses),
            _chart("validation-top1", f"Validation: {title}", names, f"{title}, %", scored),
        ]
    return [chart for chart in made if chart is not None]


def _losses(epochs: Sequence[TrainingEpoch], n: int) -> tuple[str, list[Points]]:
    """Return the title of the y axis, and the losses of `n` levels."""
    rows = [[(line.epoch, line.losses[k]) for line in epochs if k < len(line.losses)] for k in range(n)]
    return "loss", [[(epoch, loss) for epoch, loss in row if loss is not None] for row in rows]


def _scores(epochs: Sequence[TrainingEpoch], n: int, title: str) -> tuple[str, list[Points]]:
    """Return the title of the y axis, and the training scores of `n` levels where they were trained."""
    rows = [
        [
            (line.epoch, line.scores[k])
            for line in epochs
            if k < min(len(line.scores), len(line.losses)) and line.losses[k] is not None
        ]
        for k in range(n)
    ]
    return f"{title}, %", list(rows)


def _chart(
    key: str, title: str, names: Sequence[str], y_title: str, rows: Sequence[Points]
) -> CurveChart | None:
    """Return the chart of one row of points per name; None if there are no points."""
    drawn = [(k, name, row) for k, (name, row) in enumerate(zip(names, rows, strict=True), start=1) if row]
    if not drawn:
        return None
    values = [value for _, _, row in drawn for _, value in row]
    last = max(epoch for _, _, row in drawn for epoch, _ in row)
    room = max(cell_len(shorten(name)) for _, name, _ in drawn) * CELL + 2 * INSET
    x = Scale(epoch_ticks(last), FRAME.left + INSET, FRAME.right - room)
    is_loss = y_title == "loss"
    ticks = round_ticks(min(0.0, *values), max(SMALLEST_LOSS, *values)) if is_loss else percent_ticks(values)
    y = Scale(ticks, FRAME.bottom - INSET, FRAME.top + INSET)
    curves = [_curve(name, row, (k - 1) / max(len(names) - 1, 1), x, y, y_title) for k, name, row in drawn]
    labels = end_labels([name for _, name, _ in drawn], [curve.points[-1] for curve in curves])
    return CurveChart(
        key=key,
        title=title,
        x_title="epoch",
        y_title=y_title,
        x=x,
        y=y,
        curves=tuple(curves),
        labels=tuple(labels),
        unlabelled=len(drawn) - len(labels),
        description="; ".join(_describe(name, row, y_title) for _, name, row in drawn),
    )


def end_labels(names: Sequence[str], ends: Sequence[tuple[float, float]]) -> list[Label]:
    """Return labels to the right of the ends of curves, moved up or down where they would overlap.

    If there are too many names, the labels of the last ones are left out.

    Args:
        names: names of the curves.
        ends: the last point (x, y) of each curve.
    """
    named = sorted(zip(ends[:MOST_LABELS], names[:MOST_LABELS], strict=True), key=lambda item: item[0][1])
    tops: list[float] = []
    for (_, y), _ in named:
        tops.append(max(y - LINE / 2, tops[-1] + LINE if tops else FRAME.top))
    lowest = FRAME.bottom
    for index in reversed(range(len(tops))):
        tops[index] = min(tops[index], lowest - LINE)
        lowest = tops[index]
    left = max(x for (x, _), _ in named) + INSET
    labels = []
    for ((x, y), name), top in zip(named, tops, strict=True):
        text = shorten(name)
        box = Box(left, top, left + cell_len(text) * CELL, top + LINE)
        moved = abs(top + LINE / 2 - y) > LINE / 4 or x + INSET < left
        labels.append(Label(text, box, (x, y, left - 1, top + LINE / 2) if moved else None))
    return labels


def epoch_ticks(last: int) -> tuple[Tick, ...]:
    """Return ticks at whole epochs, from 0 to at least the last epoch."""
    last = max(last, 1)
    if last < MOST_TICKS:
        return tuple(Tick(float(epoch), str(epoch)) for epoch in range(last + 1))
    return round_ticks(0, last)


def _curve(name: str, row: Points, share: float, x: Scale, y: Scale, y_title: str) -> Curve:
    texts = [f"{name}: {_show(value, y_title)} after epoch {epoch}" for epoch, value in row]
    return Curve(
        points=tuple((x(epoch), y(value)) for epoch, value in row),
        texts=tuple(texts) if len(row) <= MOST_MARKS else (),
        share=round(100 * share, 1),
        width=1.4 + 2.6 * (1 - share),
    )


def _describe(name: str, row: Points, y_title: str) -> str:
    (first, start), (last, end) = row[0], row[-1]
    return f"{name}: {_show(start, y_title)} after epoch {first}, {_show(end, y_title)} after epoch {last}"


def _show(value: float, y_title: str) -> str:
    return f"loss {value:.4g}" if y_title == "loss" else f"{y_title.removesuffix(', %')} {value:.2f} %"
