"""Where results go: standard output or a file; progress and messages go to standard error."""

import logging
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from typing import Any

from nestify.errors import GateFailed
from nestify.evaluation.gates import GateResult, missed
from nestify.files import atomic_file
from nestify.report.evaluation import gates_table, missed_gates
from nestify.report.sheet import Sheet
from nestify.terminal import encodable, print_stderr


class Verbosity(IntEnum):
    """How much a command prints on standard error.

    Attributes:
        quiet: only warnings and errors.
        normal: progress as well.
        verbose: also what libraries log, and progress every few seconds.
    """

    quiet = 0
    normal = 1
    verbose = 2


_WORDS = {
    "-q": Verbosity.quiet,
    "--quiet": Verbosity.quiet,
    "-v": Verbosity.verbose,
    "--verbose": Verbosity.verbose,
}

_verbosity = ContextVar("verbosity", default=Verbosity.normal)


def verbosity() -> Verbosity:
    """Return how much the running command prints."""
    return _verbosity.get()


def take_verbosity(words: Sequence[str]) -> list[str]:
    """Set the verbosity from the words of a command line; the last such option wins.

    Returns:
        The words without the options for verbosity.
    """
    found = [_WORDS[word] for word in words if word in _WORDS]
    _verbosity.set(found[-1] if found else Verbosity.normal)
    if verbosity() is Verbosity.verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s", force=True)
    return [word for word in words if word not in _WORDS]


def write_result(text: str, output: Path | None) -> None:
    """Print a result, or write it to a file atomically.

    Args:
        text: the result, with its last newline.
        output: file to write; None for standard output.

    Raises:
        OutputError: if the result cannot be written.
    """
    if output is not None:
        with atomic_file(output) as file:
            file.write(text.encode())
        return
    sys.stdout.write(encodable(text, sys.stdout))
    sys.stdout.flush()


def print_unless_quiet(text: str) -> None:
    """Print a line on standard error, except with --quiet."""
    if verbosity() is not Verbosity.quiet:
        print_stderr(text)


def gates_sheets(results: Sequence[GateResult]) -> list[Sheet]:
    """Return the table of all gates, or no table if there are no gates."""
    return [gates_table(results)] if results else []


def gates_document(results: Sequence[GateResult]) -> dict[str, Any]:
    """Return the entries of a JSON document for gates."""
    return {"gates": [asdict(result) for result in results], "passed": not missed(results)}


def refuse_missed(path: str, results: Sequence[GateResult]) -> None:
    """Check that a nested file misses no gate.

    Args:
        path: name of the file, for the message.
        results: results of its gates.

    Raises:
        GateFailed: if a gate is missed.
    """
    if failed := missed(results):
        were = "were" if len(failed) > 1 else "was"
        raise GateFailed(
            f"{path}: {missed_gates(results)} {were} missed; the table of gates shows by how much"
        )
