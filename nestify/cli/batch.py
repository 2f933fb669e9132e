"""`nestify batch`: many recipes, each in a process and a folder of its own."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nestify.cli.arguments import complete_recipe


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
        Path, typer.Option("--out", help="Folder for the folders of the jobs.", show_default=False)
    ],
    shard: Annotated[
        str, typer.Option("--shard", metavar="I/N", help="Run the I-th of N shares of the jobs.")
    ] = "1/1",
    max_parallel: Annotated[int, typer.Option("--max-parallel", min=1, help="Processes at once.")] = 1,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Run what is done as well, and begin everything anew.")
    ] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Begin no job after a failure.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the jobs and how they stand, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Run compress for many recipes, and for every combination of the values in their matrix.

    Each job has a process and a folder of its own. What is done is skipped, what was cut off goes on, what
    failed runs again. The folder gets results.jsonl, with a JSON object for each job, and junit.xml; those
    of a shard have its number in their names.

    Exit code: 0 if all is done; 1 if nothing worse than a missed gate or budget happened; else that of the
    most serious job, 70 before 4, 3 and 2, where a killed job counts as 3; 130 or 143 if interrupted.
    """
    from nestify.batching.batch import plan_batch, run_batch
    from nestify.cli.batch_display import BatchDisplay, plan_document, plan_table, result_table
    from nestify.cli.output import render, write_result

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
