"""`run_batch`: a batch of jobs."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nestify.compression.batch.jobs import Job, Shard, make_jobs, parse_shard
from nestify.compression.batch.matrix import NO_SETTINGS
from nestify.compression.batch.results import (
    SCHEMA_VERSION,
    JobResult,
    earlier_result,
    exit_code,
    is_over,
    log_tail,
)
from nestify.compression.batch.runner import COMMAND, BatchObserver, Runner
from nestify.compression.batch.tables import write_jsonl, write_junit
from nestify.errors import OutputError, RecipeError
from nestify.shown import Shown

LOG_LINES = 40
"""Number of lines of a job's log in JUnit XML."""

Standing = Literal["new", "done", "missed", "interrupted", "failed", "changed"]


@dataclass(frozen=True, repr=False)
class BatchResult(Shown):
    """Results of the jobs of one shard.

    Attributes:
        jobs: results in the order of the jobs, including those that an earlier batch finished.
        stopped: number of the signal that ended the batch; None if there was none.
    """

    out: Path
    shard: Shard
    jobs: tuple[JobResult, ...]
    stopped: int | None = None

    @property
    def exit_code(self) -> int:
        """Exit code of the batch; see `nestify.compression.batch.results.exit_code`."""
        return exit_code(self.jobs, self.stopped)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values with a schema version."""
        return {
            "schema_version": SCHEMA_VERSION,
            "out": str(self.out),
            "shard": str(self.shard),
            "exit_code": self.exit_code,
            "jobs": [job.model_dump(mode="json") for job in self.jobs],
        }


def run_batch(
    recipes: str | Sequence[str],
    out: str | os.PathLike[str],
    *,
    settings: Mapping[str, object] = NO_SETTINGS,
    shard: str = "1/1",
    max_parallel: int = 1,
    rerun: bool = False,
    fail_fast: bool = False,
    observer: BatchObserver | None = None,
    command: Sequence[str] = COMMAND,
) -> BatchResult:
    """Run `compress` for every recipe, and every combination of the values in its [matrix].

    Each job has its own process and its own folder `out/NAME`. Finished jobs are skipped, interrupted ones
    resume, failed ones run again, and a failure stops no other job. `out` holds `results.jsonl` and
    `junit.xml`, which are updated after each job; those of a shard have its number in their names.

    Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 are passed on to the jobs, which write checkpoints; then the batch
    returns.
    A second one ends all jobs at once.

    Args:
        recipes: paths of recipes, or names of built-in ones; one or several.
        out: folder for the jobs' folders.
        settings: options that replace those of every recipe, by dotted key: `{"train.epochs": 3}`. A job that
            was done with other settings runs again.
        shard: `2/4` runs the second of four shares of the jobs.
        max_parallel: number of processes at once.
        rerun: whether to run finished jobs too, and to start every job from scratch.
        fail_fast: whether to start no further job after a failure.
        observer: notified of progress.
        command: command of a job, to which the path of its recipe is appended.

    Raises:
        RecipeError: with every problem of every recipe, before any job starts.
        OutputError: if the folder cannot be written.
    """
    if max_parallel < 1:
        raise RecipeError(
            f"--max-parallel {max_parallel} is less than 1; give the number of processes to run at once"
        )
    share = parse_shard(shard)
    recipes = [recipes] if isinstance(recipes, str) else recipes
    folder = Path(out)
    jobs = make_jobs(recipes, folder, share, settings)
    _make_folder(folder)

    def write() -> None:
        write_jsonl(folder / f"results{share.suffix}.jsonl", list(runner.results.values()))

    runner = Runner(
        jobs,
        observer or BatchObserver(),
        write,
        max_parallel=max_parallel,
        rerun=rerun,
        fail_fast=fail_fast,
        command=command,
    )
    start = time.monotonic()
    try:
        runner.run()
    finally:
        results = list(runner.results.values())
        write()
        logs = {job.name: log_tail(job, LOG_LINES) for job in jobs}
        suite = f"nestify batch{share.suffix}"
        seconds = time.monotonic() - start
        write_junit(folder / f"junit{share.suffix}.xml", suite, results, logs, seconds)
    return BatchResult(folder, share, tuple(results), runner.stopped)


def plan_batch(
    recipes: Sequence[str],
    out: str | os.PathLike[str],
    *,
    settings: Mapping[str, object] = NO_SETTINGS,
    shard: str = "1/1",
) -> list[tuple[Job, Standing]]:
    """Return the jobs of a shard and the state of each; writes nothing.

    Raises:
        RecipeError: with every problem of every recipe.
    """
    return [(job, _standing(job)) for job in make_jobs(recipes, Path(out), parse_shard(shard), settings)]


def _standing(job: Job) -> Standing:
    earlier = earlier_result(job)
    if earlier is None:
        return "new"
    if is_over(job, earlier):
        return "done" if earlier.state == "done" else "missed"
    if earlier.fingerprint != job.identity or earlier.state == "done":  # or its file is gone
        return "changed"
    return "failed" if earlier.state == "failed" else "interrupted"


def _make_folder(path: Path) -> Path:
    """Create the folder of a batch.

    Raises:
        OutputError: if it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"--out {path}: cannot be created ({error.strerror or error}); choose another folder"
        ) from error
    return path
