"""Where results go: standard output or a file; progress and messages go to standard error."""

import errno
import io
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from nestify.addresses import hide_passwords
from nestify.errors import GateFailed, OutputError
from nestify.evaluation.gates import GateResult, missed
from nestify.files import atomic_file
from nestify.report.evaluation import gates_table, missed_gates
from nestify.report.sheet import Sheet


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


WIDE = 10_000
"""Columns for output that is not fitted to a terminal: more than any table needs."""


def render(title: str, sheets: Sequence[Sheet], notes: Sequence[str], stream: TextIO | None) -> str:
    """Return title, tables and notes as text, fitted to a terminal or at full width.

    Args:
        title: first line.
        sheets: tables, in order.
        notes: lines below the tables.
        stream: where the text will be printed; None for a file. If it is a terminal, the text fits its width.
    """
    terminal = Console(file=stream) if is_terminal(stream) else None
    width = terminal.width if terminal else None
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=width or WIDE,
        force_terminal=terminal is not None,
        color_system="auto" if terminal else None,
        highlight=False,
        markup=False,
    )
    console.print(hide_passwords(title))  # here too, because the text may be wrapped
    for sheet in sheets:
        table, left_out = sheet.fit(width)
        console.print()
        if sheet.title:
            console.print(sheet.title)
        console.print(table)
        if left_out:
            console.print(f"(columns that do not fit: {', '.join(left_out)})")
    console.print()
    for note in notes:
        console.print(hide_passwords(note))
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    return "\n".join(lines).rstrip("\n") + "\n"


def render_markdown(title: str, sheets: Sequence[Sheet], notes: Sequence[str]) -> str:
    """Return title, tables and notes as Markdown, with every column."""
    return "\n\n".join([title, *(sheet.markdown() for sheet in sheets), *notes]) + "\n"


def write_result(text: str, output: Path | None) -> None:
    """Print a result, or write it to a file atomically. A pipe that its reader has closed is not an error.

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
        return
    if sys.stdout is None:
        raise OutputError("standard output is closed; redirect it to a file or a pipe")
    try:
        sys.stdout.write(_encodable(text, sys.stdout))
        sys.stdout.flush()
    except OSError as error:
        abandon_stdout()
        if error.errno != errno.EPIPE:
            raise OutputError(
                f"standard output: cannot be written ({error.strerror or error}); redirect it elsewhere"
            ) from error


def abandon_stdout() -> None:
    """Redirect standard output to the null device, so that Python's exit does not fail to flush it."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_stderr(text: str) -> None:
    """Print a line on standard error; a standard error that is closed must not end the work."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(_encodable(hide_passwords(text), sys.stderr) + "\n")
        sys.stderr.flush()


def print_unless_quiet(text: str) -> None:
    """Print a line on standard error, except with --quiet."""
    if verbosity() is not Verbosity.quiet:
        print_stderr(text)


def _encodable(text: str, stream: TextIO) -> str:
    """Return the text with the characters that the stream's encoding lacks replaced."""
    encoding = stream.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("─", "-").encode(encoding, errors="replace").decode(encoding)
    return text


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is an open terminal."""
    return stream is not None and not stream.closed and stream.isatty()


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
