"""The results of a batch as a table. No torch here."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nestify.recipe.metric import METRICS, TOP1, Metric
from nestify.report.sheet import Column, Sheet
from nestify.report.table import mebibytes, number
from nestify.report.text import Screen

if TYPE_CHECKING:
    from nestify.compression.batch.batch import BatchResult
    from nestify.compression.batch.results import JobResult


def batch_screen(result: "BatchResult") -> Screen:
    """Return what is shown of a batch: its jobs, why jobs failed, where the logs are, how to resume."""
    done = sum(job.state == "done" for job in result.jobs)
    where = str(result.out) if str(result.shard) == "1/1" else f"{result.out}, shard {result.shard}"
    title = f"{done} of {count_jobs(len(result.jobs))} done in {where}"
    return Screen(title, [result_table(result)], batch_notes(result))


def result_table(result: "BatchResult") -> Sheet:
    """Return the table of a batch's results, one row per job."""
    jobs = result.jobs
    codes = ["-" if job.exit_code is None else str(job.exit_code) for job in jobs]
    return Sheet(
        [
            Column("job", [job.name for job in jobs], is_text=True),
            Column("state", [_state(job) for job in jobs], is_text=True),
            Column("exit code", codes, rank=3),
            Column("seconds", ["-" if job.seconds is None else f"{job.seconds:.1f}" for job in jobs], rank=4),
            *(
                Column(
                    f"{metric.title} % of the levels",
                    [join_scores(job.scores if job.metric == metric.key else []) for job in jobs],
                    is_text=True,
                    rank=1,
                )
                for metric in _metrics(jobs)
            ),
            Column("MiB", ["-" if job.bytes is None else mebibytes(job.bytes) for job in jobs], rank=2),
        ]
    )


def batch_notes(result: "BatchResult") -> list[str]:
    """Return notes below the table of results: why jobs failed, where the logs are, how to resume."""
    notes = [f"{job.name}: {job.message}" for job in result.jobs if job.state == "failed" and job.message]
    if any(job.state == "failed" for job in result.jobs):
        notes.append(f"The log of a job is {result.out}/JOB/log.txt.")
    if any(job.state in ("interrupted", "pending") for job in result.jobs):
        notes.append("Run the same command to resume.")
    return notes


def _state(result: "JobResult") -> str:
    """Return the state of a job in words."""
    if result.earlier:
        return earlier_state(result)
    return "not started" if result.state == "pending" else result.state


def earlier_state(result: "JobResult") -> str:
    """Return the state of a job that an earlier batch finished."""
    return "done earlier" if result.state == "done" else "missed a limit earlier"


def _metrics(jobs: Sequence["JobResult"]) -> list[Metric]:
    """Return what the levels of some job are judged by; top-1 if no job has scores."""
    keys = {job.metric for job in jobs if job.scores}
    return [metric for metric in METRICS if metric.key in keys] or [TOP1]


def score_text(job: "JobResult") -> str:
    """Return the scores of a job's levels, core first, and what they are."""
    title = next((metric.title for metric in METRICS if metric.key == job.metric), job.metric)
    return f"{title} {join_scores(job.scores)}"


def join_scores(scores: Sequence[float | None]) -> str:
    """Return the scores of a job's levels, core first; a dash if there are none."""
    return " / ".join(map(number, scores)) or "-"


def count_jobs(count: int) -> str:
    """Return a number of jobs in words."""
    return "1 job" if count == 1 else f"{count} jobs"
