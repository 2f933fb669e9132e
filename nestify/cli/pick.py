"""`nestify pick`: choose the best level of a nested file that meets limits on this machine."""

import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestify.cli.arguments import AsJson, Device, Engine, Int8, NestedFileOrAddress

if TYPE_CHECKING:
    from nestify.evaluation.pick import Limit, Pick
    from nestify.recipe.amounts import Limited

SCHEMA_VERSION = 1

EXAMPLES: "dict[Limited, str]" = {
    "latency": "10ms, 0.5s or 800us",
    "bytes": "4MB or 4MiB",
    "macs": "1G or 300M",
    "params": "2M",
    "top1": "a percentage such as 70",
}


def pick(
    file: NestedFileOrAddress,
    max_latency: Annotated[
        str | None,
        typer.Option(
            "--max-latency",
            help="Median latency of one batch on this machine: 10ms, 0.5s, 800us. It is measured.",
        ),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option("--max-bytes", help="Bytes of the file up to and including the level: 4MB, 4MiB."),
    ] = None,
    max_macs: Annotated[
        str | None,
        typer.Option(
            "--max-macs", help="MACs per image that dense kernels execute, zeros included: 1G, 300M."
        ),
    ] = None,
    max_params: Annotated[
        str | None, typer.Option("--max-params", help="Parameters that are not masked out: 2M.")
    ] = None,
    min_top1: Annotated[
        str | None, typer.Option("--min-top1", help="Top-1 in percent, as compress measured it: 70.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Images per call when the latency is measured.")
    ] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads on the CPU.", show_default="torch's default")
    ] = None,
    device: Device = "auto",
    saved: Annotated[
        bool,
        typer.Option(
            "--saved", help="Use the latency that bench --save stored for this machine; measure nothing."
        ),
    ] = False,
    engine: Engine = False,
    int8: Int8 = False,
    as_json: AsJson = False,
) -> None:
    """Print the name of the best level that meets all limits; exit with 1 if there is none.

    The best level is the one with the highest top-1, or mean average precision or agreement; the highest
    level if levels predict different classes or were not evaluated. The table on standard error shows every
    level and the limits it misses.

        level=$(nestify pick resnet.nested.safetensors --max-latency 10ms) &&
        nestify export resnet.nested.safetensors --level $level --format onnx
    """
    limits = _parse_limits(
        {"latency": max_latency, "bytes": max_bytes, "macs": max_macs, "params": max_params, "top1": min_top1}
    )
    from nestify.cli.output import json_text, print_unless_quiet, write_result
    from nestify.evaluation.pick import pick as run
    from nestify.report.evaluation import pick_notes, pick_table
    from nestify.report.text import render

    done = run(
        file,
        limits,
        batch_size=batch_size,
        threads=threads,
        device=device,
        saved=saved,
        engine=engine,
        int8=int8,
    )
    if as_json:
        write_result(json_text(_document(done)), None)
        done.check()
    else:
        title = f"{done.path}: {', '.join(map(str, limits))}"
        text = render(title, [pick_table(done)], pick_notes(done), sys.stderr)
        print_unless_quiet(text.rstrip("\n"), rendered=True)
        write_result(_picked_name(done) + "\n", None)


def _parse_limits(texts: "dict[Limited, str | None]") -> "list[Limit]":
    """Parse the limits that the command line gives.

    Args:
        texts: value of each limit's option; None if it is not given.

    Raises:
        RecipeError: with a sentence for each limit that is not understood.
    """
    from nestify.errors import RecipeError
    from nestify.evaluation.pick import Limit, option
    from nestify.recipe.amounts import parse_limit

    limits, problems = [], []
    for limited, text in texts.items():
        if text is None:
            continue
        try:
            limits.append(Limit(limited, parse_limit(limited, text)))
        except ValueError as error:
            remedy = "" if str(error).endswith("?") else f"; give {EXAMPLES[limited]}"
            problems.append(f"{option(limited)} {error}{remedy}")
    if problems:
        raise RecipeError(problems)
    return limits


def _picked_name(done: "Pick") -> str:
    """Return the name of the picked level, checked to be one word for a shell.

    Raises:
        GateFailed: if no level meets all limits.
        BadFileError: if the name is not a plain word, which nestify never writes.
    """
    from nestify.errors import BadFileError

    name = done.check().name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise BadFileError(
            f"{done.path}: the name of the picked level, {name!r}, is not a plain word; use --json"
        )
    return name


def _document(done: "Pick") -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "file": done.path,
        "limits": {limit.limited: limit.bound for limit in done.limits},
        "picked": None if done.level is None else {"level": done.level.level, "name": done.level.name},
        "measurement": None if done.measurement is None else done.measurement.model_dump(mode="json"),
        "levels": [
            {
                "level": candidate.level,
                "name": candidate.name,
                **candidate.values,
                "misses": [limit.limited for limit in candidate.missed],
            }
            for candidate in done.candidates
        ],
    }
