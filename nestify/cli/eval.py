"""`nestify eval`: measure what the levels of a nested file are judged by."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, get_args
from warnings import catch_warnings, simplefilter

import typer

from nestify.cli.arguments import (
    AsJson,
    Device,
    Engine,
    Int8,
    NestedFileOrAddress,
    ReduceRange,
    TrainSplit,
    choice_option,
    parse_percent,
)
from nestify.cli.limits import check_limits, levels_below
from nestify.recipe.metric import AGREEMENT, COSINE, MAP, TOP1, Metric
from nestify.recipe.options import ConsensusKind, OnBadImage

if TYPE_CHECKING:
    from nestify.evaluation.evaluate import Evaluation

SCHEMA_VERSION = 1


def evaluate(
    context: typer.Context,
    file: NestedFileOrAddress,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Images: a folder of class folders, a tar, or hfds/..., wds/..., torch/... Required, except "
            "with --knn.",
        ),
    ] = None,
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
        str | None,
        typer.Option(
            "--split",
            "--val-split",
            help="Split to evaluate on. After compress --holdout, only the held-out images of the training "
            "split are used.",
            show_default="validation, or else the one that the file was validated on",
        ),
    ] = None,
    all_images: Annotated[
        bool,
        typer.Option("--all-images", help="Use the images that the levels were trained on too."),
    ] = False,
    unlabelled: Annotated[
        bool,
        typer.Option(
            "--unlabelled",
            help="Use no labels: compare each level with the full level, on images in any folder.",
        ),
    ] = False,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="CSV",
            help="Table of the labels of each image, which may have several, in place of class folders.",
        ),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            "--original",
            metavar="CHECKPOINT",
            help="With --unlabelled: compare with the original model's weights, .safetensors or .pth.",
            show_default="the full level",
        ),
    ] = None,
    knn: Annotated[
        str | None,
        typer.Option(
            "--knn",
            metavar="IMAGES",
            help="In place of --data: labelled images of any classes, to measure the k-NN accuracy of each "
            "level's features.",
        ),
    ] = None,
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
            parser=parse_percent,
            metavar="PERCENT",
            help="Exit with 1 if an evaluated level's top-1 is below this percent.",
        ),
    ] = None,
    min_map: Annotated[
        float | None,
        typer.Option(
            "--min-map",
            parser=parse_percent,
            metavar="PERCENT",
            help="With --labels: exit with 1 if an evaluated level's mean average precision is below this "
            "percent.",
        ),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            "--min-agreement",
            parser=parse_percent,
            metavar="PERCENT",
            help="With --unlabelled: exit with 1 if an evaluated level's agreement is below this percent.",
        ),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(
            "--min-cosine",
            parser=parse_percent,
            metavar="PERCENT",
            help="With --unlabelled: exit with 1 if an evaluated level's mean cosine similarity is below "
            "this percent, also of a backbone.",
        ),
    ] = None,
    save: Annotated[
        bool,
        typer.Option(
            "--save",
            help="Store the accuracy by class next to FILE (resnet.eval.json) for report --format html; it "
            "replaces an older one.",
        ),
    ] = False,
    engine: Engine = False,
    int8: Int8 = False,
    calibrate_images: Annotated[
        int | None,
        typer.Option(
            "--calibrate-images", min=1, help="Training images to calibrate --int8 on.", show_default="100"
        ),
    ] = None,
    train_split: TrainSplit = None,
    reduce_range: ReduceRange = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate levels on labelled images, with the model, preprocessing and classes stored in the file.

    With --unlabelled the images need no labels, and the result is agreement, not accuracy. With --labels
    images may have several labels, and the result is the mean average precision.

    images/s counts only the forward passes, not image loading. With --level, --consensus and --cascade use
    the levels up to that one.
    """
    from nestify.cli.output import Verbosity, json_text, print_unless_quiet, verbosity, write_result
    from nestify.errors import GateFailed, NestifyWarning, RecipeError
    from nestify.evaluation.evaluate import evaluate as run
    from nestify.evaluation.on_engine import CALIBRATION_IMAGES
    from nestify.report.evaluation import evaluation_notes, evaluation_sheets, images_note
    from nestify.report.text import render
    from nestify.terminal import print_stderr, progress_bar

    if knn is not None:
        options = {
            "level": level,
            "data_root": data_root,
            "batch_size": batch_size,
            "workers": workers,
            "device": device,
            "max_images": max_images,
            "on_bad_image": on_bad_image,
        }
        _refuse_others(context, ("file", "knn", "as_json", *options))
        _evaluate_knn(file, knn, as_json, **options)
        return
    if data is None:
        context.fail("Missing option '--data'.")
    given = {TOP1: min_top1, MAP: min_map, AGREEMENT: min_agreement, COSINE: min_cosine}
    limits = {metric: limit for metric, limit in given.items() if limit is not None}
    check_limits(limits, labels is not None, unlabelled)
    for option, value in {"--calibrate-images": calibrate_images, "--train-split": train_split}.items():
        if value is not None and not int8:
            raise RecipeError(f"{option} has no use without --int8; add it, or leave the option out")
    with progress_bar("images", hidden=verbosity() is Verbosity.quiet) as progress, catch_warnings():
        simplefilter("ignore", NestifyWarning)  # they are in the result, and printed below
        done = run(
            file,
            data,
            level=level,
            consensus=consensus,
            cascade=cascade,
            split=split,
            all_images=all_images,
            unlabelled=unlabelled,
            labels=labels,
            original=original,
            data_root=data_root,
            batch_size=batch_size,
            workers=workers,
            device=device,
            max_images=max_images,
            on_bad_image=on_bad_image,
            save=save,
            engine=engine,
            int8=int8,
            calibrate_images=calibrate_images or CALIBRATION_IMAGES,
            train_split=train_split,
            reduce_range=reduce_range,
            progress=progress,
        )
    for warning in done.warnings:
        print_stderr(f"warning: {warning}")
    if as_json:
        write_result(json_text(_document(done, limits)), None)
        if done.images.changed:
            print_stderr(f"warning: {images_note(done.images)}")
    else:
        title = f"{done.path} on {data}"
        write_result(render(title, evaluation_sheets(done), evaluation_notes(done), sys.stdout), None)
    if done.saved is not None:
        print_unless_quiet(f"Saved: {done.saved}")
    if AGREEMENT in limits and done.levels[0].metric is COSINE:
        raise RecipeError(f"--min-agreement compares classes, and {done.path} has none; use --min-cosine")
    for metric, limit in limits.items():
        if failed := levels_below(done, metric, limit):
            raise GateFailed(f"{done.path}: {failed}, below {metric.flag} {limit:g}")


def _refuse_others(context: typer.Context, names: Sequence[str]) -> None:
    """Refuse options that have no meaning with --knn.

    Args:
        context: the command line.
        names: names of the parameters that have one.

    Raises:
        RecipeError: naming the others that were given.
    """
    from nestify.errors import RecipeError

    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in names
        and parameter.name is not None
        and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise RecipeError(f"{', '.join(given)} cannot be used with --knn; leave out one of them")


def _evaluate_knn(file: str, data: str, as_json: bool, **options: Any) -> None:
    """Measure and print the k-NN accuracy of levels."""
    from nestify.cli.output import Verbosity, json_text, verbosity, write_result
    from nestify.evaluation.knn import evaluate_knn
    from nestify.report.evaluation import knn_notes, knn_table
    from nestify.report.text import render
    from nestify.terminal import progress_bar

    with progress_bar("images", hidden=verbosity() is Verbosity.quiet) as progress:
        done = evaluate_knn(file, data, progress=progress, **options)
    if as_json:
        write_result(json_text({"schema_version": SCHEMA_VERSION, **asdict(done)}), None)
    else:
        title = f"{done.path} on {data}, k-NN"
        write_result(render(title, [knn_table(done)], knn_notes(done), sys.stdout), None)


def _document(done: "Evaluation", limits: Mapping[Metric, float]) -> dict[str, Any]:
    """Return the result as JSON values; what was not measured is not in it."""
    metric = done.levels[0].metric
    document = {
        "schema_version": SCHEMA_VERSION,
        "file": done.path,
        "data": done.data,
        "images": {
            **asdict(done.images),
            "held_out": done.images.held_out and done.images.held_out.model_dump(),
        },
        "levels": [
            {"name": name, "classes": classes, "class_set": class_set, **asdict(result)}
            for name, (classes, class_set), result in zip(done.names, done.classes, done.levels, strict=True)
        ],
        "consensus": [asdict(row) for row in done.consensus],
        "cascade": [asdict(row) for row in done.cascade],
        "calibrated": done.calibrated,
        "skipped": dict(done.skipped),
        metric.gate: None,
        **{each.gate: limit for each, limit in limits.items()},
        "passed": not any(levels_below(done, each, limit) for each, limit in limits.items()),
    }
    if metric.is_comparison:
        document["reference"] = done.reference
    if metric is not TOP1:
        for key in ("consensus", "cascade", "calibrated"):
            del document[key]
    return document
