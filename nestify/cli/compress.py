"""`nestify compress`: make a nested file from a pretrained model."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nestify.cli.arguments import RecipeOrModel, Settings
from nestify.cli.flags import with_recipe_flags
from nestify.files import sibling
from nestify.launcher import read_launch
from nestify.recipe.flags import Panel
from nestify.recipe.sources import parse_setting

if TYPE_CHECKING:
    from nestify.compression.compress import Result
    from nestify.training.observer import Observer

USUAL_CALIBRATION = 0.05
"""Share of the training images that `--consensus` holds out."""


@with_recipe_flags
def compress(
    recipe: RecipeOrModel,
    *,
    levels: Annotated[
        str | None,
        typer.Option(
            "--levels",
            help="from the core to the full level: sparsities (0.95,0.8,0) or N:M patterns (1:4,2:4,0), "
            "widths with --schedule channel (0.25,0.5,1), depths with layer (0.5,0.75,1), or budgets "
            "(macs=0.25,macs=0.5,1) (default 0.95,0.8,0)",
            rich_help_panel=Panel.levels,
        ),
    ] = None,
    consensus: Annotated[
        bool,
        typer.Option(
            "--consensus",
            help=f"the same as --calibrate {USUAL_CALIBRATION:g}",
            rich_help_panel=Panel.levels,
        ),
    ] = False,
    settings: Settings = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--restart",
            help="Resume from the checkpoint of an interrupted run, or start again. By default the run "
            "resumes if there is a checkpoint.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
    overrides: dict[str, object],
) -> None:
    """Make a nested file from a pretrained model and images.

    An option overrides the recipe, and the recipe overrides the default. A log of the run is written next
    to the file, NAME.metrics.jsonl. If the data has another number of classes than the checkpoint, the
    classifier is replaced and trained first.

    Run the same command again to resume an interrupted run from NAME.resume.safetensors. This checkpoint is
    saved after each epoch, every ten minutes (train.checkpoint_minutes), and on Ctrl-C, SIGTERM, SIGHUP and
    SIGUSR1. The exit code is then 130 after Ctrl-C and 143 after the others.
    """
    if levels is not None:
        overrides["levels"] = levels
    if consensus:
        overrides.setdefault("data.calibrate", USUAL_CALIBRATION)
    overrides |= dict(parse_setting(text) for text in settings or [])
    run(recipe, overrides, resume, dry_run, as_json)


def run(source: str, overrides: dict[str, object], resume: bool | None, dry_run: bool, as_json: bool) -> None:
    """Read the recipe, then print the plan, or compress and print the table of levels.

    Args:
        source: the recipe or model, as given on the command line.
        overrides: values of flags, by recipe key.
        resume: True to resume, False to start again, None to resume if there is a checkpoint.
        dry_run: whether to print the plan and stop.
        as_json: whether to print JSON.
    """
    from nestify.recipe.recipe import WrongOptionsError, load_recipe

    try:
        recipe = load_recipe(source, overrides)
    except WrongOptionsError as error:
        if error.source:  # a recipe's own problems are reported at once, without importing torch
            raise
        from nestify.compression.preflight import with_further_problems

        raise with_further_problems(error) from None
    from nestify.cli.output import json_text, write_result
    from nestify.compression import compress as api
    from nestify.report.plan import plan_document, plan_text
    from nestify.training.display import Display

    if dry_run:
        plan = api.plan(recipe, estimate=True, observer=Display(quiet=True))
        text = json_text(plan_document(plan)) if as_json else plan_text(plan, sys.stdout)
        write_result(text, None)
        return
    show_run(lambda observer: api.compress(recipe, observer=observer, resume=resume), as_json)


def show_run(start: "Callable[[Observer | None], Result]", as_json: bool) -> None:
    """Run `compress` or `extend` with its progress on standard error, and print the table of levels.

    Args:
        start: starts the run with an observer.
        as_json: whether to print JSON.
    """
    from nestify.cli.output import (
        Verbosity,
        gates_document,
        gates_sheets,
        json_text,
        print_unless_quiet,
        refuse_missed,
        verbosity,
        write_result,
    )
    from nestify.file.summary import read_report
    from nestify.report.table import report_notes, report_table
    from nestify.report.text import render
    from nestify.training.display import Display

    if read_launch().rank:  # one of several processes; only rank 0 prints
        start(None)
        return
    level = verbosity()
    with Display(quiet=level is Verbosity.quiet, verbose=level is Verbosity.verbose) as display:
        result = start(display)
    report = read_report(result.path)
    if as_json:
        document = {**report.to_dict(layers=True), **gates_document(result.gates)}
        write_result(json_text(document), None)
        display.repeat_warnings()
        refuse_missed(report.path, result.gates)
        return
    title = f"{report.architecture}, {report.num_classes} classes"
    notes = [*report_notes(report), f"Written: {Path(result.path)}"]
    sheets = [report_table(report), *gates_sheets(result.gates)]
    write_result(render(title, sheets, notes, sys.stdout), None)
    display.repeat_warnings()
    refuse_missed(report.path, result.gates)
    print_unless_quiet(next_steps(result.path, report.levels[0].name))


def next_steps(path: Path, level: str) -> str:
    """Return the commands that a user may run next on a nested file, quoted for a shell, one per line.

    Args:
        path: the nested file.
        level: name of the level that is cut out and exported.
    """

    def quote(file: Path) -> str:
        text = str(file)
        return shlex.quote(f"./{text}" if text.startswith("-") else text)

    file, part, model = (
        quote(each)
        for each in (path, sibling(path, f".{level}.safetensors"), sibling(path, f".{level}.onnx"))
    )
    return "\n".join(
        (
            "Next:",
            f"  nestify bench {file}",
            f"  nestify slice {file} --level {level} -o {part}",
            f"  nestify export {file} --level {level} -o {model}",
        )
    )
