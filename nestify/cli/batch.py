"""`nestify batch`: run many recipes, each in its own process and folder."""

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

from nestify.cli.arguments import Settings, complete_recipe
from nestify.cli.output import Verbosity, json_text, print_unless_quiet, verbosity
from nestify.compression.batch.batch import Standing
from nestify.compression.batch.jobs import Job
from nestify.compression.batch.results import SCHEMA_VERSION, JobResult
from nestify.compression.batch.runner import BatchObserver
from nestify.compression.batch.tables import progress
from nestify.files import metrics_path
from nestify.recipe.sources import parse_setting
from nestify.report.batch import batch_screen, count_jobs, earlier_state, score_text
from nestify.report.sheet import Column, Sheet
from nestify.text import LONGEST_MESSAGE, printable

REFRESH = 0.25
"""Seconds between two updates of the table of running jobs."""


class BatchDisplay(BatchObserver):
    """Progress of a batch on standard error: a line per event and, at a terminal, a table of running jobs."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)
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

    def _running_table(self, running: Sequence[Job], now: float) -> Table:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(overflow="ellipsis", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        for job in running:
            seconds = f"{now - self._start_times[job.name]:.0f} s"
            steps = progress(metrics_path(job.recipe.output_path))
            table.add_row(printable(job.name), printable(steps), seconds)
        return table

    def _print(self, text: str) -> None:
        text = printable(text, LONGEST_MESSAGE)
        if self._live.is_started:
            self.console.print(text)
        else:
            print_unless_quiet(text)


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
    return json_text({"schema_version": SCHEMA_VERSION, "jobs": jobs})


def _describe(result: JobResult) -> str:
    if result.earlier:
        return f"{earlier_state(result)}, skipped"
    after = f"after {result.seconds or 0:.1f} s"
    if result.state == "done":
        return f"done {after}, {score_text(result)}"
    return f"{result.state} {after} with exit code {result.exit_code}: {result.message}"


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
    settings: Settings = None,
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
    failed jobs run again; with other values of --set, finished jobs run again too. The results are written to
    results.jsonl, with one JSON object per job, and to junit.xml, both in the folder --out; with --shard, the
    names of the files contain the number of the shard.

    Exit code: 0 if all jobs are done; 1 if nothing worse than a missed gate or budget happened; otherwise
    that of the most serious failure, in the order 70, 4, 3, 2, where a killed job counts as 3; 130 or 143 if
    the batch was interrupted.
    """
    from nestify.cli.output import write_result
    from nestify.compression.batch.batch import plan_batch, run_batch
    from nestify.report.text import render

    overrides = dict(map(parse_setting, settings or []))
    where = f"{out}, shard {shard}" if shard != "1/1" else str(out)
    if dry_run:
        plan = plan_batch(recipes, out, settings=overrides, shard=shard)
        title = f"{count_jobs(len(plan))} in {where}"
        text = plan_document(plan) if as_json else render(title, [plan_table(plan)], [], sys.stdout)
        write_result(text, None)
        return
    with BatchDisplay() as display:
        result = run_batch(
            recipes,
            out,
            settings=overrides,
            shard=shard,
            max_parallel=max_parallel,
            rerun=rerun,
            fail_fast=fail_fast,
            observer=display,
        )
    if as_json:
        write_result(json_text(result.to_dict()), None)
    else:
        write_result(render(*batch_screen(result), sys.stdout), None)
    if result.exit_code:
        raise typer.Exit(result.exit_code)
