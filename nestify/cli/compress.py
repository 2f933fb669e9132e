"""`nestify compress`: pretrained model in, nested file out."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from nestify.recipe.recipe import option_help
from nestify.recipe.sources import builtin_recipes, parse_setting

_MODEL = "Model and images"
_LEVELS = "Levels"
_TRAINING = "Training"

USUAL_CALIBRATION = 0.05


def _option(key: str, *names: str, panel: str) -> typer.models.OptionInfo:
    """A flag for a recipe's option, with the option's own help; the default stays the recipe's."""
    info: typer.models.OptionInfo = typer.Option(
        *names, help=_literal(option_help(key)), rich_help_panel=panel, show_default=False
    )
    return info


def _literal(text: str) -> str:
    """A text that Markdown, which help texts are in, shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)


def _recipes(begun: str) -> list[str]:
    """Built-in recipes that a shell may complete a word to; it completes paths by itself."""
    return [name for name in builtin_recipes() if name.startswith(begun)]


def compress(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_MODEL",
            help="A .toml recipe, a built-in recipe (digits), or a timm model's name.",
            show_default=False,
            autocompletion=_recipes,
        ),
    ],
    checkpoint: Annotated[str | None, _option("model.checkpoint", "--checkpoint", panel=_MODEL)] = None,
    new_head: Annotated[
        bool | None, _option("model.new_head", "--new-head/--keep-head", panel=_MODEL)
    ] = None,
    input_size: Annotated[int | None, _option("model.input_size", "--input-size", panel=_MODEL)] = None,
    data: Annotated[str | None, _option("data.path", "--data", panel=_MODEL)] = None,
    data_root: Annotated[str | None, _option("data.root", "--data-root", panel=_MODEL)] = None,
    train_split: Annotated[str | None, _option("data.train_split", "--train-split", panel=_MODEL)] = None,
    val_split: Annotated[str | None, _option("data.val_split", "--val-split", panel=_MODEL)] = None,
    holdout: Annotated[float | None, _option("data.holdout", "--holdout", panel=_MODEL)] = None,
    calibrate: Annotated[float | None, _option("data.calibrate", "--calibrate", panel=_LEVELS)] = None,
    consensus: Annotated[
        bool,
        typer.Option(
            "--consensus",
            help=f"the same as --calibrate {USUAL_CALIBRATION:g}",
            rich_help_panel=_LEVELS,
        ),
    ] = False,
    max_train: Annotated[int | None, _option("data.max_train", "--max-train", panel=_MODEL)] = None,
    max_val: Annotated[int | None, _option("data.max_val", "--max-val", panel=_MODEL)] = None,
    hierarchy: Annotated[str | None, _option("data.hierarchy", "--hierarchy", panel=_LEVELS)] = None,
    workers: Annotated[int | None, _option("data.workers", "--workers", panel=_MODEL)] = None,
    on_bad_image: Annotated[str | None, _option("data.on_bad_image", "--on-bad-image", panel=_MODEL)] = None,
    output: Annotated[str | None, _option("output", "-o", "--output", panel=_MODEL)] = None,
    dtype: Annotated[str | None, _option("dtype", "--dtype", panel=_MODEL)] = None,
    schedule: Annotated[str | None, _option("schedule.kind", "--schedule", panel=_LEVELS)] = None,
    levels: Annotated[
        str | None,
        typer.Option(
            "--levels",
            help="from the core to the full level: sparsities (0.95,0.8,0) or N:M patterns (1:4,2:4,0), "
            "widths with --schedule channel (0.25,0.5,1), depths with layer (0.5,0.75,1), or budgets "
            "(macs=0.25,macs=0.5,1) (default 0.95,0.8,0)",
            rich_help_panel=_LEVELS,
        ),
    ] = None,
    score: Annotated[str | None, _option("schedule.score", "--score", "--criterion", panel=_LEVELS)] = None,
    pattern: Annotated[str | None, _option("schedule.pattern", "--pattern", panel=_LEVELS)] = None,
    skip: Annotated[list[str] | None, _option("schedule.skip", "--skip", panel=_LEVELS)] = None,
    bn: Annotated[str | None, _option("train.bn", "--bn", panel=_LEVELS)] = None,
    epochs: Annotated[float | None, _option("train.epochs", "--epochs", panel=_TRAINING)] = None,
    finetune_epochs: Annotated[
        int | None, _option("finetune.epochs", "--finetune-epochs", panel=_TRAINING)
    ] = None,
    batch_size: Annotated[int | None, _option("train.batch_size", "--batch-size", panel=_TRAINING)] = None,
    lr: Annotated[float | None, _option("train.lr", "--lr", panel=_TRAINING)] = None,
    opt: Annotated[str | None, _option("train.opt", "--opt", panel=_TRAINING)] = None,
    teacher: Annotated[str | None, _option("train.teacher", "--teacher", panel=_TRAINING)] = None,
    amp: Annotated[bool | None, _option("train.amp", "--amp/--no-amp", panel=_TRAINING)] = None,
    compiled: Annotated[bool | None, _option("train.compile", "--compile", panel=_TRAINING)] = None,
    seed: Annotated[int | None, _option("seed", "--seed", panel=_TRAINING)] = None,
    device: Annotated[str | None, _option("device", "--device", panel=_TRAINING)] = None,
    log: Annotated[list[str] | None, _option("train.log", "--log", panel=_TRAINING)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="any other option of a recipe, as in train.warmup_epochs=2; may be repeated",
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--restart",
            help="Go on from the checkpoint of a run that was cut off, or begin anew. By default it goes on "
            "where there is one.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Make a nested file from a pretrained model and images.

    An option beats the recipe, and the recipe beats the default. Beside the file lies a log of the run,
    NAME.metrics.jsonl. Where the data has other classes than the checkpoint, --new-head with
    --finetune-epochs learns a fresh classifier first.

    A run that is cut off goes on when the same command is given again, from NAME.resume.safetensors, which
    is written after each epoch, every ten minutes (train.checkpoint_minutes), and on Ctrl-C, SIGTERM and
    SIGUSR1, which end the run with 130, 143 and 143.
    """
    overrides: dict[str, object] = {
        "model.checkpoint": checkpoint,
        "model.new_head": new_head,
        "model.input_size": input_size,
        "data.path": data,
        "data.root": data_root,
        "data.train_split": train_split,
        "data.val_split": val_split,
        "data.holdout": holdout,
        "data.calibrate": USUAL_CALIBRATION if consensus and calibrate is None else calibrate,
        "data.max_train": max_train,
        "data.max_val": max_val,
        "data.hierarchy": hierarchy,
        "data.workers": workers,
        "data.on_bad_image": on_bad_image,
        "output": output,
        "dtype": dtype,
        "schedule.kind": schedule,
        "levels": levels,
        "schedule.score": score,
        "schedule.pattern": pattern,
        "schedule.skip": skip or None,
        "train.bn": bn,
        "train.epochs": epochs,
        "finetune.epochs": finetune_epochs,
        "train.batch_size": batch_size,
        "train.lr": lr,
        "train.opt": opt,
        "train.teacher": teacher,
        "train.amp": amp,
        "train.compile": compiled,
        "train.log": log or None,
        "seed": seed,
        "device": device,
        **dict(parse_setting(text) for text in settings or []),
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    run(recipe, given, resume, dry_run, as_json)


def run(source: str, overrides: dict[str, object], resume: bool | None, dry_run: bool, as_json: bool) -> None:
    """Read the recipe, then plan, or compress and print the table of levels."""
    from nestify.recipe.recipe import load_recipe

    recipe = load_recipe(source, overrides)  # told before torch is imported
    from nestify.cli.output import gates_document, gates_sheets, refuse_missed, render, write_result
    from nestify.cli.progress import Display, plan_document, plan_text
    from nestify.compress import compress as api
    from nestify.file.summary import read_report
    from nestify.report.table import report_notes, report_table

    if dry_run:
        plan = api.plan(recipe, estimate=True)
        text = json.dumps(plan_document(plan), indent=2) + "\n" if as_json else plan_text(plan, sys.stdout)
        write_result(text, None)
        return
    if os.environ.get("RANK", "0") != "0":  # one of several processes; the first one tells
        api.compress(recipe, resume=resume)
        return
    with Display() as display:
        result = api.compress(recipe, observer=display, resume=resume)
    report = read_report(result.path)
    if as_json:
        document = {**report.to_dict(layers=True), **gates_document(result.gates)}
        write_result(json.dumps(document, indent=2) + "\n", None)
        display.repeat_warnings()
        refuse_missed(report.path, result.gates)
        return
    title = f"{report.architecture}, {report.num_classes} classes"
    notes = [*report_notes(report), f"Written: {Path(result.path)}"]
    sheets = [report_table(report), *gates_sheets(result.gates)]
    write_result(render(title, sheets, notes, sys.stdout), None)
    display.repeat_warnings()
    refuse_missed(report.path, result.gates)
