"""Does nestify work with every family of timm models? Runs all steps for the smallest model of each.

    python tests/benchmarks/families.py                         # all families, half an hour on one core
    python tests/benchmarks/families.py --only vgg,swin_transformer
    python tests/benchmarks/families.py --markdown > families.md

A checkpoint of each model, with random weights, is opened, planned, nested at three levels, trained for one
step of every level, saved and loaded; see `tests/family_walk.py` for the comparisons. Every family has its
own process, so that a family that crashes, or needs too much memory or time, does not stop the others.
Requires that processes can be forked.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
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

sys.path.insert(0, str(Path(__file__).parents[2]))
from nestify.errors import NestifyError
from tests.family_walk import WalkResult, smallest_model, walk

GIB = 2**30
HEADINGS = ("family", "variant", "input", "parameters", "maskable", "result", "seconds", "peak GiB")


@dataclass(frozen=True)
class Outcome:
    """Result of one family.

    Attributes:
        family: name of the family.
        name: name of its smallest model; empty if it is not known.
        walked: facts about the model; None if not all steps succeeded.
        result: `works`, `refused: ` and nestify's reason, or `FAILS: ` and the error.
        seconds: time of the steps; time of the complete process if it was killed or crashed.
        peak_bytes: peak memory of the process; 0 if it did not report it.
    """

    family: str
    name: str
    walked: WalkResult | None
    result: str
    seconds: float
    peak_bytes: int

    @property
    def works(self) -> bool:
        return self.walked is not None


def main() -> int:
    """Print the table; return exit code 1 if a family neither works nor is refused."""
    options = _options()
    families = options.only.split(",") if options.only else timm.list_modules()
    if unknown := set(families) - set(timm.list_modules()):
        sys.exit(f"not a family of timm {timm.__version__}: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # forked processes must not inherit threads
    bound = (options.memory * GIB, options.timeout)
    progress = Console(stderr=True)
    start = time.perf_counter()
    outcomes = []
    for family in track(families, console=progress):
        outcomes.append(_walk_apart(family, *bound))
        progress.print(escape(" | ".join(_cells(outcomes[-1]))), soft_wrap=True)
    _print(outcomes, options.markdown)
    works = sum(outcome.works for outcome in outcomes)
    print(f"\n{works} of {len(outcomes)} families work ({time.perf_counter() - start:.0f} seconds)")
    return int(any(outcome.result.startswith("FAILS") for outcome in outcomes))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help="families, separated by commas; all by default", metavar="A,B")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for each family (default 600)")
    parser.add_argument("--memory", type=int, default=10, help="GiB for each family (default 10)")
    return parser.parse_args()


def _walk_apart(family: str, memory_bytes: int, timeout: int) -> Outcome:
    """Run all steps for a family's smallest model in its own process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    start = time.perf_counter()
    process = context.Process(target=_child, args=(family, memory_bytes, sender))
    process.start()
    sender.close()
    name, outcome, failure = "", None, ""
    try:
        while outcome is None:
            if not receiver.poll(max(0, start + timeout - time.perf_counter())):
                failure = f"FAILS: not done after {timeout} seconds"
                process.kill()
                break
            message = receiver.recv()
            name, outcome = (message, None) if isinstance(message, str) else (name, message)
    except EOFError:
        process.join()
        failure = f"FAILS: its process ended with exit code {process.exitcode}"
    process.join()
    return outcome or Outcome(family, name, None, failure, time.perf_counter() - start, 0)


def _child(family: str, memory_bytes: int, pipe: Connection) -> None:
    """Send the name of the variant, then the outcome."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some models print
    start = time.perf_counter()
    walked, name = None, ""
    try:
        name = smallest_model(family)
        pipe.send(name)
        warnings.simplefilter("error")  # as in the test suite
        start = time.perf_counter()
        walked = walk(name)
        result = "works"
    except NestifyError as error:
        result = f"refused: {error}"
    except Exception as error:  # any exception is a result
        result = f"FAILS: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send(Outcome(family, name, walked, result, time.perf_counter() - start, peak))


def _cells(outcome: Outcome) -> tuple[str, ...]:
    walked = outcome.walked
    facts = ("", "", "")
    variant = outcome.name
    if walked is not None:
        facts = (
            "x".join(map(str, walked.input_size[1:])),
            f"{walked.parameters:,}",
            f"{walked.maskable / walked.parameters:.1%}",
        )
        variant += "".join(f" {key}={value}" for key, value in walked.kwargs.items())
    peak = f"{outcome.peak_bytes / GIB:.1f}" if outcome.peak_bytes else ""
    return (outcome.family, variant, *facts, outcome.result, f"{outcome.seconds:.1f}", peak)


def _print(outcomes: Sequence[Outcome], markdown: bool) -> None:
    rows = [_cells(outcome) for outcome in outcomes]
    if markdown:
        print("| " + " | ".join(HEADINGS) + " |\n" + "|---" * len(HEADINGS) + "|")
        for row in rows:
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        return
    table = Table(*HEADINGS)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    sys.exit(main())
