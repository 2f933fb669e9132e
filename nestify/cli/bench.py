"""`nestify bench`: measure latency and throughput of the levels of a nested file on this machine."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from nestify.cli.arguments import (
    AsJson,
    Device,
    Engine,
    Int8,
    NestedFileOrAddress,
    TrainSplit,
    parse_whole_numbers,
)
from nestify.errors import RecipeError

if TYPE_CHECKING:
    from nestify.evaluation.rivals import Rivals

SCHEMA_VERSION = 1


def bench(
    file: NestedFileOrAddress,
    level: Annotated[
        str,
        typer.Option(
            "--level", help="Level by number or name, or all; the full level is always measured too."
        ),
    ] = "all",
    batch_size: Annotated[
        str, typer.Option("--batch-size", help="Images per call: one number or several.")
    ] = "1,16",
    threads: Annotated[
        str | None,
        typer.Option(
            "--threads",
            help="Threads on the CPU: one number or several, as in 1,4.",
            show_default="torch's default",
        ),
    ] = None,
    device: Device = "auto",
    warmup: Annotated[
        float,
        typer.Option("--warmup", help="Seconds of warm-up before each measurement, at least two rounds."),
    ] = 0.5,
    seconds: Annotated[
        float, typer.Option("--seconds", help="Seconds of each measurement, at least 10 rounds.")
    ] = 3.0,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", help="Exact number of rounds.", show_default="by --seconds"),
    ] = None,
    save: Annotated[
        bool,
        typer.Option(
            "--save",
            help="Store the result next to FILE (resnet.bench.json) for report and pick; it replaces an "
            "older result for the same machine, device, threads and batch size.",
        ),
    ] = False,
    engine: Engine = False,
    int8: Int8 = False,
    rivals: Annotated[
        bool,
        typer.Option(
            "--rivals",
            help="Measure levels in torch and on the engine, those of pattern 1x4 in int8 too, next to the "
            "full level on ONNX Runtime and, if installed, OpenVINO, in float32 and int8, on the CPU.",
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="With --int8 or --rivals: images to calibrate int8 on.",
            show_default="random images",
        ),
    ] = None,
    train_split: TrainSplit = None,
    as_json: AsJson = False,
) -> None:
    """Measure how long levels take for a batch of synthetic images, and show their MACs.

    Levels take turns, round by round, so that other load on the machine slows all of them down alike; all
    are in memory at the same time. Latency over full is the median of the ratios of the rounds; its
    quartiles show how much the ratios vary.
    """
    batch_sizes = parse_whole_numbers("--batch-size", batch_size)
    counts = None if threads is None else parse_whole_numbers("--threads", threads)
    if data is not None and not (rivals or int8):
        raise RecipeError(
            "--data calibrates the int8 models of --rivals and --int8; add one of them or leave --data out"
        )
    if train_split is not None and data is None:
        raise RecipeError("--train-split has no use without --data; add it, or leave the option out")
    for option, given in {"--save": save, "--int8": int8}.items():
        if rivals and given:
            raise RecipeError(f"--rivals and {option} exclude each other; leave one of them out")
    if rivals:
        from nestify.evaluation.rivals import bench_rivals

        found = bench_rivals(
            file,
            level=level,
            batch_sizes=batch_sizes,
            threads=counts,
            device=device,
            warmup=warmup,
            seconds=seconds,
            rounds=rounds,
            data=data,
            train_split=train_split,
        )
        _write_rivals(found, as_json)
        return
    from nestify.cli.output import json_text, print_unless_quiet, write_result
    from nestify.evaluation.bench import bench as run
    from nestify.report.bench import bench_document, bench_sheets, int8_notes, masked_notes, noise_notes
    from nestify.report.text import render

    done = run(
        file,
        level=level,
        batch_sizes=batch_sizes,
        threads=counts,
        device=device,
        warmup=warmup,
        seconds=seconds,
        rounds=rounds,
        save=save,
        engine=engine,
        int8=int8,
        data=data,
        train_split=train_split,
    )
    if as_json:
        document = {
            "schema_version": SCHEMA_VERSION,
            "file": done.path,
            "measurements": [bench_document(done.report, measurement) for measurement in done.measurements],
            "saved": None if done.saved is None else str(done.saved),
        }
        write_result(json_text(document), None)
    else:
        measured = (done.report, done.measurements)
        notes = masked_notes(*measured) + int8_notes(*measured) + noise_notes(*measured)
        title = f"{done.path}, {done.report.architecture}"
        write_result(render(title, bench_sheets(*measured), notes, sys.stdout), None)
    if done.saved is not None:
        print_unless_quiet(f"Saved: {done.saved}")


def _write_rivals(found: "Rivals", as_json: bool) -> None:
    from nestify.cli.output import json_text, write_result
    from nestify.report.rivals import rivals_document, rivals_notes, rivals_sheets
    from nestify.report.text import render

    if as_json:
        document = {"schema_version": SCHEMA_VERSION, "file": found.path, **rivals_document(found)}
        write_result(json_text(document), None)
    else:
        title = f"{found.path}, {found.report.architecture}"
        write_result(render(title, rivals_sheets(found), rivals_notes(found), sys.stdout), None)
