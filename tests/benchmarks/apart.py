"""Runs a check for every family of timm models, each in its own process, and prints a table of the results.

A family that crashes, or needs too much memory or time, does not stop the others. Requires that processes can
be forked.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own deprecation warnings on import
    import timm
    import torch
    from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from nestify.errors import NestifyError
from tests.family_walk import SMALLER, create_plain
from tests.model.graph.builders import randomise

GIB = 2**30

Row = dict[str, str]
SendCells = Callable[[Row], None]
Check = Callable[[str, SendCells], str]
"""Checks a family; sends the cells of its row as soon as they are known, and returns the result: `works`, or
`WRONG: ` and the reason."""


def walk_families(doc: str, columns: Sequence[str], check: Check) -> int:
    """Check all families and print the table.

    Args:
        doc: docstring of the script; its first line is shown in the help.
        columns: columns of the table in addition to the family and its result.
        check: the check.

    Returns:
        The exit code: 1 if a family neither works nor is refused, otherwise 0.
    """
    options = _options(doc)
    families = options.only.split(",") if options.only else timm.list_modules()
    if unknown := set(families) - set(timm.list_modules()):
        sys.exit(f"not a family of timm {timm.__version__}: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # forked processes must not inherit threads
    progress = Console(stderr=True)
    rows = []
    for family in track(families, console=progress):
        row = {"family": family} | dict.fromkeys((*columns, "result"), "")
        rows.append(_try_apart(check, row, options.memory * GIB, options.timeout))
        progress.print(escape(" | ".join(rows[-1].values())), soft_wrap=True)
    _print(rows, options.markdown)
    print(f"\n{sum(row['result'].startswith('works') for row in rows)} of {len(rows)} families work")
    return int(any(row["result"].startswith(("WRONG", "FAILS")) for row in rows))


def example(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model for small images, with random tensors, and two images; in float64 if possible."""
    torch.manual_seed(0)
    model, side = create_plain(name, dict(SMALLER.get(name, {})))
    side = side or model.pretrained_cfg["input_size"][-1]
    model, images = randomise(model.eval()), torch.randn(2, 3, side, side)
    double = deepcopy(model).double()
    for buffer in double.buffers():
        if buffer.is_floating_point():
            buffer.nan_to_num_(posinf=10, neginf=-10)
    try:
        double(images.double())
    except RuntimeError:  # it casts to another type itself
        return model, images
    return double, images.double()


def _options(doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--only", help="families, separated by commas; all by default", metavar="A,B")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for each family (default 600)")
    parser.add_argument("--memory", type=int, default=10, help="GiB for each family (default 10)")
    return parser.parse_args()


def _try_apart(check: Check, row: Row, memory_bytes: int, timeout: int) -> Row:
    """Check a family in its own process, which sends its cells one by one."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(check, row["family"], memory_bytes, sender))
    process.start()
    sender.close()
    end = time.perf_counter() + timeout
    try:
        while not row["result"]:
            if receiver.poll(max(0, end - time.perf_counter())):
                row |= json.loads(receiver.recv())
            else:
                row["result"] = f"FAILS: not done after {timeout} seconds"
                process.kill()
    except EOFError:
        process.join()
        row["result"] = f"FAILS: its process ended with exit code {process.exitcode}"
    process.join()
    return row


def _child(check: Check, family: str, memory_bytes: int, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some models print
    warnings.simplefilter("ignore")
    try:
        with torch.no_grad():
            result = check(family, lambda row: pipe.send(json.dumps(row)))
    except NestifyError as error:
        result = f"refused: {error}"
    except Exception as error:  # any exception is a result
        result = f"FAILS: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    pipe.send(json.dumps({"result": result}))


def _print(rows: list[Row], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        for row in rows:
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in row.values()) + " |")
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(escape, row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
