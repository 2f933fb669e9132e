"""What results and runs are judged by."""

from types import SimpleNamespace

import pytest

from nestify.recipe.metric import AGREEMENT, COSINE, MAP, METRICS, TOP1, Metric, metric_of, metric_of_run
from nestify.recipe.options import DataOptions

NOTHING = dict.fromkeys([metric.key for metric in METRICS])


@pytest.mark.parametrize(
    ("measured", "metric", "score"),
    [
        ({"top1": 70.0}, TOP1, 70),
        ({"map": 70.0}, MAP, 70),
        ({"agreement": 90.0, "cosine": 0.9}, AGREEMENT, 90),
        ({"cosine": 0.9}, COSINE, 90),
        ({}, TOP1, None),
    ],
)
def test_the_metric_is_the_one_that_was_measured(
    measured: dict[str, float], metric: Metric, score: float | None
) -> None:
    found = SimpleNamespace(**{**NOTHING, **measured})
    assert metric_of(found) is metric
    assert metric.score(found) == score


def test_the_metric_of_a_run() -> None:
    assert metric_of_run(DataOptions(path="photos")) is TOP1
    assert metric_of_run(DataOptions(path="photos", labels="labels.csv")) is MAP
    without = DataOptions(path="photos", unlabelled=True)
    assert metric_of_run(without) is AGREEMENT
    assert metric_of_run(without, classifies=False) is COSINE


def test_flags_and_gates_have_one_name() -> None:
    assert [metric.flag for metric in METRICS] == [
        "--min-top1",
        "--min-map",
        "--min-agreement",
        "--min-cosine",
    ]
