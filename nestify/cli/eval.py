"""`nestify eval`: measure the accuracy of the levels of a nested file."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from nestify.cli.arguments import AsJson, Device, NestedFileOrAddress, choice_option
from nestify.recipe.options import ConsensusKind, OnBadImage

if TYPE_CHECKING:
    from nestify.evaluation.evaluate import Evaluation

SCHEMA_VERSION = 1


def evaluate(
    file: NestedFileOrAddress,
    data: Annotated[
        str,
        typer.Option(
            "--data", help="Images: a folder of class folders, a tar, or hfds/..., wds/..., torch/..."
        ),
    ],
    level: Annotated[str, typer.Option("--level", help="Level by number or name, or all.")] = "all",
    consensus: Annotated[
        ConsensusKind | None,
        choice_option(
            get_args(ConsensusKind),
            "--consensus",
            help="Also evaluate the levels' combined prediction: the mean of their probabilities, or learned "
            "(with weights that compress --consensus fitted).",
        ),
    ] = None,
    cascade: Annotated[
        str | None,
        typer.Option(
            "--cascade",
            help="Also evaluate a cascade, in which the first level that is confident enough answers: a "
            "confidence threshold (0.8), macs=0.5 (mean MACs over the full level's), or sweep.",
        ),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", "--val-split", help="Split to evaluate on.")
    ] = "validation",
    data_root: Annotated[
        str | None, typer.Option("--data-root", help="Folder of an hfds/..., wds/... or torch/... dataset.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")] = 64,
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="Processes that load images.", show_default="auto")
    ] = None,
    device: Device = "auto",
    max_images: Annotated[
        int | None,
        typer.Option("--max-images", min=1, help="Maximum number of images to use.", show_default="all"),
    ] = None,
    on_bad_image: Annotated[
        OnBadImage,
        choice_option(
            get_args(OnBadImage),
            "--on-bad-image",
            help="What to do with an unreadable image: refuse ends the command, skip leaves the image out.",
        ),
    ] = "refuse",
    min_top1: Annotated[
        float | None,
        typer.Option(
            "--min-top1",
            min=0,
            max=100,
            help="Exit with 1 if an evaluated level's top-1 is below this percent.",
        ),
    ] = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Run levels on the sparse engine, on the CPU.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate levels on labelled images, with the model, preprocessing and classes stored in the file.

    images/s counts only the forward passes, not image loading. With --level, --consensus and --cascade use
    the levels up to that one.
    """
    from nestify.cli.output import print_stderr, render, write_result
    from nestify.errors import GateFailed
    from nestify.evaluation.evaluate import evaluate as run
    from nestify.report.evaluation import cascade_table, consensus_table, evaluation_notes, evaluation_table

    done = run(
        file,
        data,
        level=level,
        consensus=consensus,
        cascade=cascade,
        split=split,
        data_root=data_root,
        batch_size=batch_size,
        workers=workers,
        device=device,
        max_images=max_images,
        on_bad_image=on_bad_image,
        engine=engine,
    )
    for warning in done.warnings:
        print_stderr(f"warning: {warning}")
    if as_json:
        write_result(json.dumps(_document(done, min_top1), indent=2) + "\n", None)
    else:
        tables = [evaluation_table(done)]
        if done.consensus:
            tables.append(consensus_table(done))
        if done.cascade:
            tables.append(cascade_table(done))
        notes = evaluation_notes(done)
        write_result(render(f"{file} on {data}", tables, notes, sys.stdout), None)
    if failed := _levels_below(done, min_top1):
        raise GateFailed(f"{file}: {failed}, below --min-top1 {min_top1:g}")


def _levels_below(done: "Evaluation", min_top1: float | None) -> str:
    """Return the levels whose top-1 is below the gate, in words; empty if there are none."""
    return ", ".join(
        f"level {result.level} ({name}) has top-1 {result.top1:.2f} %"
        for name, result in zip(done.names, done.levels, strict=True)
        if min_top1 is not None and result.top1 < min_top1
    )


def _document(done: "Evaluation", min_top1: float | None) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "file": done.path,
        "data": done.data,
        "levels": [
            {"name": name, "classes": classes, "class_set": class_set, **asdict(result)}
            for name, (classes, class_set), result in zip(done.names, done.classes, done.levels, strict=True)
        ],
        "consensus": [asdict(row) for row in done.consensus],
        "cascade": [asdict(row) for row in done.cascade],
        "calibrated": done.calibrated,
        "skipped": dict(done.skipped),
        "min_top1": min_top1,
        "passed": not _levels_below(done, min_top1),
    }
