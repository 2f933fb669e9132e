"""`nestify batch`: run many recipes, each in its own process and folder."""

import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from nestify.addresses import hide_passwords
from nestify.cli.arguments import complete_recipe
from nestify.cli.output import Verbosity, print_unless_quiet, verbosity
from nestify.compression.batch.batch import BatchResult, Standing
from nestify.compression.batch.jobs import Job
from nestify.compression.batch.results import SCHEMA_VERSION, JobResult
from nestify.compression.batch.runner import BatchObserver
from nestify.compression.batch.tables import progress
from nestify.files import metrics_path
from nestify.report.sheet import Column, Sheet
from nestify.report.table import mebibytes, number

REFRESH = 0.25
"""Seconds between two updates of the table of running jobs."""


class BatchDisplay(BatchObserver):
    """Progress of a batch on standard error: a line per event and, at a terminal, a table of running jobs."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False)
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._start_times: dict[str, float] = {}
        self._last_update = 0.0

    def __enter__(self) -> "BatchDisplay":
        if self.console.is_terminal and verbosity() is not Verbosity.quiet:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def began(self, job: Job, goes_on: bool) -> None:
        """Print that a job began, or was resumed."""
        self._start_times[job.name] = time.monotonic()
        self._print(f"{job.name}: {'resumed from its checkpoint' if goes_on else 'began'}")

    def ended(self, job: Job, result: JobResult) -> None:
        """Print how a job ended."""
        self._print(f"{job.name}: {_describe(result)}")

    def waiting(self, job: Job) -> None:
        """Print that another process is using the job's folder."""
        self._print(f"{job.name}: waiting for another process that is using {job.folder}")

    def stopping(self, number: int) -> None:
        """Print that a signal stops the batch."""
        name = signal.Signals(number).name
        self._print(f"{name}: waiting for the jobs to save checkpoints; a second signal ends them at once")

    def ticked(self, running: Sequence[Job]) -> None:
        """Update the table of running jobs at a terminal, at most once every `REFRESH` seconds."""
        now = time.monotonic()
        if self._live.is_started and now - self._last_update >= REFRESH:
            self._last_update = now
            self._live.update(self._running_table(running, now), refresh=True)

    def notes(self, result: BatchResult) -> list[str]:
        """Return notes below the table of results: why jobs failed, where the logs are, how to resume."""
        notes = [f"{job.name}: {job.message}" for job in result.jobs if job.state == "failed" and job.message]
        if any(job.state == "failed" for job in result.jobs):
            notes.append(f"The log of a job is {result.out}/JOB/log.txt.")
        if any(job.state in ("interrupted", "pending") for job in result.jobs):
            notes.append("Run the same command to resume.")
        return notes

    def _running_table(self, running: Sequence[Job], now: float) -> Table:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(overflow="ellipsis", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        for job in running:
            seconds = f"{now - self._start_times[job.name]:.0f} s"
            table.add_row(job.name, progress(metrics_path(job.recipe.output_path)), seconds)
        return table

    def _print(self, text: str) -> None:
        if self._live.is_started:
            self.console.print(hide_passwords(text))
        else:
            print_unless_quiet(text)


def result_table(result: BatchResult) -> Sheet:
    """Return the table of a batch's results, one row per job."""
    jobs = result.jobs
    codes = ["-" if job.exit_code is None else str(job.exit_code) for job in jobs]
    return Sheet(
        [
            Column("job", [job.name for job in jobs], is_text=True),
            Column("state", [_state(job) for job in jobs], is_text=True),
            Column("exit code", codes, rank=3),
            Column("seconds", ["-" if job.seconds is None else f"{job.seconds:.1f}" for job in jobs], rank=4),
            Column("top-1 % of the levels", [_join(job.top1) for job in jobs], is_text=True, rank=1),
            Column("MiB", ["-" if job.bytes is None else mebibytes(job.bytes) for job in jobs], rank=2),
        ]
    )


def plan_table(plan: Sequence[tuple[Job, Standing]]) -> Sheet:
    """Return the table of a batch's jobs before it runs, one row per job."""
    return Sheet(
        [
            Column("job", [job.name for job, _ in plan], is_text=True),
            Column("state", [standing for _, standing in plan], is_text=True),
            Column("recipe", [job.source for job, _ in plan], is_text=True, rank=1),
        ]
    )


def plan_document(plan: Sequence[tuple[Job, Standing]]) -> str:
    """Return the jobs of a batch before it runs, as a JSON document."""
    jobs = [
        {
            "name": job.name,
            "recipe": job.source,
            "options": dict(job.options),
            "state": standing,
            "folder": str(job.folder),
            "fingerprint": job.identity,
        }
        for job, standing in plan
    ]
    return json.dumps({"schema_version": SCHEMA_VERSION, "jobs": jobs}, indent=2) + "\n"


def _describe(result: JobResult) -> str:
    if result.earlier:
        return f"{_earlier_state(result)}, skipped"
    after = f"after {result.seconds or 0:.1f} s"
    if result.state == "done":
        return f"done {after}, top-1 {_join(result.top1)}"
    return f"{result.state} {after} with exit code {result.exit_code}: {result.message}"


def _state(result: JobResult) -> str:
    if result.earlier:
        return _earlier_state(result)
    return "not started" if result.state == "pending" else result.state


def _earlier_state(result: JobResult) -> str:
    return "done earlier" if result.state == "done" else "missed a limit earlier"


def _join(top1: Sequence[float | None]) -> str:
    return " / ".join(map(number, top1)) or "-"


def batch(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPES...",
            help="Recipes, or names of built-in ones (digits).",
            show_default=False,
            autocompletion=complete_recipe,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Folder in which each job gets its own folder.", show_default=False)
    ],
    shard: Annotated[
        str, typer.Option("--shard", metavar="I/N", help="Run the I-th of N shares of the jobs.")
    ] = "1/1",
    max_parallel: Annotated[
        int, typer.Option("--max-parallel", min=1, help="Number of jobs that run at the same time.")
    ] = 1,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Run finished jobs too, and start every job from scratch.")
    ] = False,
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", help="Start no further jobs after a failure.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the jobs and their states, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Run compress for many recipes, and for every combination of the values in their matrix.

    Each job has its own process and folder. Finished jobs are skipped, interrupted jobs are resumed, and
    failed jobs run again. The results are written to results.jsonl, with one JSON object per job, and to
    junit.xml, both in the folder --out; with --shard, the names of the files contain the number of the shard.

    Exit code: 0 if all jobs are done; 1 if nothing worse than a missed gate or budget happened; otherwise
    that of the most serious failure, in the order 70, 4, 3, 2, where a killed job counts as 3; 130 or 143 if
    the batch was interrupted.
    """
    from nestify.cli.output import render, write_result
    from nestify.compression.batch.batch import plan_batch, run_batch

    where = f"{out}, shard {shard}" if shard != "1/1" else str(out)
    if dry_run:
        plan = plan_batch(recipes, out, shard=shard)
        title = f"{_jobs(len(plan))} in {where}"
        text = plan_document(plan) if as_json else render(title, [plan_table(plan)], [], sys.stdout)
        write_result(text, None)
        return
    with BatchDisplay() as display:
        result = run_batch(
            recipes,
            out,
            shard=shard,
            max_parallel=max_parallel,
            rerun=rerun,
            fail_fast=fail_fast,
            observer=display,
        )
    if as_json:
        write_result(json.dumps(result.to_dict(), indent=2) + "\n", None)
    else:
        done = sum(job.state == "done" for job in result.jobs)
        title = f"{done} of {_jobs(len(result.jobs))} done in {where}"
        write_result(render(title, [result_table(result)], display.notes(result), sys.stdout), None)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"
