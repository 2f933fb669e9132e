"""`nestify bench`: latency and throughput of the levels of a nested file on this machine."""

import json
import sys
from typing import Annotated

import typer

from nestify.cli.arguments import AsJson, Device, NestedFileOrAddress, whole_numbers

SCHEMA_VERSION = 1


def bench(
    file: NestedFileOrAddress,
    level: Annotated[
        str, typer.Option("--level", help="Level by number or name, or all; the full level always runs too.")
    ] = "all",
    batch_size: Annotated[
        str, typer.Option("--batch-size", help="Images per call, one or several.")
    ] = "1,16",
    threads: Annotated[
        str | None,
        typer.Option(
            "--threads", help="Threads on the CPU, one or several: 1,4.", show_default="torch's own choice"
        ),
    ] = None,
    device: Device = "auto",
    warmup: Annotated[
        float, typer.Option("--warmup", help="Seconds before each measurement, two rounds at least.")
    ] = 0.5,
    seconds: Annotated[
        float, typer.Option("--seconds", help="Seconds of each measurement, 10 rounds at least.")
    ] = 3.0,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", help="Exactly so many rounds instead.", show_default="by --seconds"),
    ] = None,
    save: Annotated[
        bool,
        typer.Option(
            "--save",
            help="Keep the result beside FILE (resnet.bench.json) for report and pick; it replaces an older "
            "one of the same machine, device, threads and batch size.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure how long levels take for a batch of synthetic images, beside their MACs.

    Levels take turns, round by round, so that whatever else the machine does hurts all alike; all are in
    memory at once. Latency over full is the median of the rounds' ratios; its quartiles say how much they
    differ.
    """
    batch_sizes = whole_numbers("--batch-size", batch_size)
    counts = None if threads is None else whole_numbers("--threads", threads)
    from nestify.cli.output import render, tell, write_result
    from nestify.evaluation.bench import bench as run
    from nestify.report.bench import bench_document, bench_sheets, masked_notes, noise_notes

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
    )
    if as_json:
        document = {
            "schema_version": SCHEMA_VERSION,
            "file": done.path,
            "measurements": [bench_document(done.report, measurement) for measurement in done.measurements],
            "saved": None if done.saved is None else str(done.saved),
        }
        write_result(json.dumps(document, indent=2) + "\n", None)
    else:
        shown = (done.report, done.measurements)
        notes = masked_notes(*shown) + noise_notes(*shown)
        write_result(
            render(f"{done.path}, {done.report.architecture}", bench_sheets(*shown), notes, sys.stdout), None
        )
    if done.saved is not None:
        tell(f"Saved: {done.saved}")
