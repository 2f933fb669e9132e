"""Training curves: whole epochs, curves inside the frame, labels that overlap nothing."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestify.file.history import History, TrainingEpoch
from nestify.report.html.charts import FRAME
from nestify.report.html.curves import MOST_LABELS, MOST_MARKS, curve_charts, end_labels, epoch_ticks
from nestify.report.html.labels import Box
from tests.report.reports import history, level, report


def test_curves_of_a_run() -> None:
    made = curve_charts(report(), history(2, epochs=4))
    assert [chart.key for chart in made] == ["train-loss", "train-top1", "validation-loss", "validation-top1"]
    losses, _, _, top1 = made
    assert [len(curve.points) for curve in losses.curves] == [4, 4]
    assert [len(curve.points) for curve in top1.curves] == [5, 5]  # before training, too
    for core, full in zip(*(curve.points for curve in losses.curves), strict=True):
        assert core[0] == full[0]
        assert core[1] > full[1]  # the core level has the smaller loss, and y grows downwards
    assert [y1 < y2 for (_, y1), (_, y2) in pairwise(losses.curves[0].points)] == [True] * 3
    assert losses.curves[0].width > losses.curves[1].width
    assert [curve.share for curve in losses.curves] == [0, 100]
    assert [label.text for label in losses.labels] == ["level2", "level1"]
    assert "level1: loss 1 after epoch 1, loss 0.25 after epoch 4" in losses.description


def test_levels_that_were_not_sampled_have_gaps_and_no_accuracy() -> None:
    rows = [([None, 0.5], [0.0, 60.0]), ([0.4, 0.3], [70.0, 80.0])]
    epochs = [
        TrainingEpoch(event="train", epoch=epoch, losses=losses, top1=top1)
        for epoch, (losses, top1) in enumerate(rows, start=1)
    ]
    loss, top1 = curve_charts(report(), History(training=epochs))
    assert [len(curve.points) for curve in loss.curves] == [1, 2]
    assert [len(curve.points) for curve in top1.curves] == [1, 2]


def test_a_part_of_an_epoch() -> None:
    made = history(2, epochs=2)  # as 1.5 epochs are logged: the last evaluation is "after epoch 1"
    *others, after = made.validation
    part = replace(made, validation=[*others, after.model_copy(update={"epoch": 1})])
    assert curve_charts(report(), part) == curve_charts(report(), made)


def test_fine_tuning_has_charts_of_its_own() -> None:
    epochs = [TrainingEpoch(event="finetune", epoch=1, losses=[0.5], top1=[60.0])]
    made = curve_charts(report(), History(finetuning=epochs))
    assert [chart.key for chart in made] == ["finetune-loss", "finetune-top1"]
    assert [label.text for label in made[0].labels] == ["dense model"]


def test_without_training_there_are_no_curves() -> None:
    assert curve_charts(report(), History()) == []
    assert curve_charts(report(), History(validation=history(2).validation)) == []


def test_long_curves_have_no_marks() -> None:
    for epochs, marked in ((MOST_MARKS, True), (MOST_MARKS + 1, False)):
        [loss, *_] = curve_charts(report(), history(2, epochs=epochs))
        assert bool(loss.curves[0].texts) == marked


@pytest.mark.parametrize(
    ("last", "texts"),
    [
        (0, ["0", "1"]),
        (2, ["0", "1", "2"]),
        (5, ["0", "1", "2", "3", "4", "5"]),
        (6, ["0", "2", "4", "6"]),
        (300, ["0", "100", "200", "300"]),
    ],
)
def test_ticks_are_whole_epochs(last: int, texts: list[str]) -> None:
    assert [tick.text for tick in epoch_ticks(last)] == texts


@given(st.lists(st.floats(FRAME.top + 10, FRAME.bottom - 10), min_size=1, max_size=30))
@settings(max_examples=50)
def test_labels_at_the_ends_of_curves_overlap_nothing(heights: list[float]) -> None:
    labels = end_labels([f"level{k}" for k in range(len(heights))], [(200.0, y) for y in heights])
    assert len(labels) == min(len(heights), MOST_LABELS)
    for one, other in combinations(labels, 2):
        gap = max(one.box.top, other.box.top) - min(one.box.bottom, other.box.bottom)
        assert gap > -1e-6
    for label in labels:
        assert FRAME.top - 1e-6 <= label.box.top
        assert label.box.bottom <= FRAME.bottom + 1e-6


@pytest.mark.parametrize("n", [1, 3, 12, 40])
@pytest.mark.parametrize("loss", [0.0, 1e-6, 1e6])
def test_curves_are_inside_the_frame(n: int, loss: float) -> None:
    names = [f"a-long-level-name-{k}" for k in range(1, n + 1)]
    made = report(*(level(k, n, name=name) for k, name in enumerate(names, start=1)))
    epochs = [
        TrainingEpoch(event="train", epoch=epoch, losses=[loss] * n, top1=[100.0] * n) for epoch in (1, 2)
    ]
    for chart in curve_charts(made, History(training=epochs)):
        assert len(chart.labels) + chart.unlabelled == n
        for curve in chart.curves:
            assert all(FRAME.contains(Box(x, y, x, y)) for x, y in curve.points)
        for label in chart.labels:
            assert label.box.right <= FRAME.right
