"""Where results go: standard output or a file; progress and messages go to standard error."""

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from typing import Any, TextIO

from nestify.addresses import hide_passwords
from nestify.errors import GateFailed
from nestify.evaluation.gates import GateResult, missed
from nestify.files import atomic_file
from nestify.report.evaluation import gates_table, missed_gates
from nestify.report.sheet import Sheet
from nestify.terminal import encodable, print_stderr
from nestify.text import printable, printable_lines, without_non_finite


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
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_PrintableRecords("%(name)s: %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    elif logging.lastResort is not None:
        logging.lastResort.setFormatter(_PrintableRecords("%(message)s"))
    return [word for word in words if word not in _WORDS]


class _PrintableRecords(logging.Formatter):
    """Escapes what libraries log, which may contain text of a file."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message as one printable line."""
        return printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        """Return the message and, if there is one, the traceback."""
        return printable_lines(super().format(record))


@contextmanager
def printable_warnings() -> Iterator[None]:
    """Print Python's warnings, which may contain text of a file, with `print_stderr`."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = warnings.formatwarning(printable(str(message)), category, filename, lineno, line)
        print_stderr(text.rstrip("\n"))

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def json_text(document: object) -> str:
    """Return a result as the text of one JSON document; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(without_non_finite(document), indent=2) + "\n"


def write_result(text: str, output: Path | None) -> None:
    """Print a result, or write it to a file atomically and say so on standard error.

    Args:
        text: the result, with its last newline.
        output: file to write; None for standard output.

    Raises:
        OutputError: if the result cannot be written.
    """
    text = hide_passwords(text)
    if output is not None:
        with atomic_file(output) as file:
            file.write(text.encode())
        print_unless_quiet(f"Written: {output}")
        return
    sys.stdout.write(encodable(text, sys.stdout))
    sys.stdout.flush()


def print_unless_quiet(text: str, *, rendered: bool = False) -> None:
    """Print lines on standard error, except with --quiet; see `print_stderr`."""
    if verbosity() is not Verbosity.quiet:
        print_stderr(text, rendered=rendered)


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
        were = "gates were" if len(failed) > 1 else "a gate was"
        raise GateFailed(f"{path}: {were} missed: {missed_gates(results)}")
