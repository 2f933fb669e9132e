"""The table of a batch names what each job is judged by."""

from pathlib import Path

from nestify.compression.batch.batch import BatchResult
from nestify.compression.batch.jobs import Shard
from nestify.compression.batch.results import JobResult
from nestify.report.batch import result_table, score_text


def job(name: str, metric: str, *scores: float | None) -> JobResult:
    return JobResult(
        name=name, recipe="a.toml", state="done", exit_code=0, metric=metric, scores=list(scores)
    )


def test_scores_are_in_the_column_of_their_metric() -> None:
    jobs = (job("with", "top1", 61.5, 87.25), job("without", "agreement", 90.0, 100.0), job("new", "top1"))
    columns = {
        column.title: list(column.cells)
        for column in result_table(BatchResult(Path(), Shard(), jobs)).columns
    }
    assert columns["top-1 % of the levels"] == ["61.50 / 87.25", "-", "-"]
    assert columns["agreement % of the levels"] == ["-", "90.00 / 100.00", "-"]
    assert score_text(jobs[1]) == "agreement 90.00 / 100.00"


def test_without_scores_the_column_is_that_of_accuracy() -> None:
    titles = [
        column.title for column in result_table(BatchResult(Path(), Shard(), (job("new", "top1"),))).columns
    ]
    assert "top-1 % of the levels" in titles
