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

from nestify.errors import GateFailed, OutputError
from nestify.evaluation.gates import GateResult, missed
from nestify.files import atomic_file
from nestify.report.evaluation import gates_table, in_words
from nestify.report.sheet import Sheet


class Verbosity(IntEnum):
    """quiet: warnings and errors alone. verbose: also what libraries log, and progress every few seconds."""

    quiet = 0
    normal = 1
    verbose = 2


_WORDS = {
    "-q": Verbosity.quiet,
    "--quiet": Verbosity.quiet,
    "-v": Verbosity.verbose,
    "--verbose": Verbosity.verbose,
}

_now = ContextVar("verbosity", default=Verbosity.normal)


def verbosity() -> Verbosity:
    """How much the running command tells."""
    return _now.get()


def take_verbosity(words: Sequence[str]) -> list[str]:
    """Set it as a command line says, the last word counting.

    Returns:
        The words that are left.
    """
    found = [_WORDS[word] for word in words if word in _WORDS]
    _now.set(found[-1] if found else Verbosity.normal)
    if verbosity() is Verbosity.verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s", force=True)
    return [word for word in words if word not in _WORDS]


WIDE = 10_000


def render(title: str, sheets: Sequence[Sheet], notes: Sequence[str], stream: TextIO | None) -> str:
    """Title, tables and notes as text: fitted to the terminal that the stream is, else as wide as it takes.

    Args:
        stream: where the text will go; None for a file.
    """
    terminal = Console(file=stream) if _is_terminal(stream) else None
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
    console.print(title)
    for sheet in sheets:
        table, left_out = sheet.fitted(width)
        console.print()
        if sheet.title:
            console.print(sheet.title)
        console.print(table)
        if left_out:
            console.print(f"(left out for want of width: {', '.join(left_out)})")
    console.print()
    for note in notes:
        console.print(note)
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    return "\n".join(lines).rstrip("\n") + "\n"


def render_markdown(title: str, sheets: Sequence[Sheet], notes: Sequence[str]) -> str:
    """The same in Markdown, with every column."""
    return "\n\n".join([title, *(sheet.markdown() for sheet in sheets), *notes]) + "\n"


def write_result(text: str, output: Path | None) -> None:
    """Print a result, or write it to a file whole. A reader that closed the pipe has seen enough.

    Raises:
        OutputError: if it cannot be written.
    """
    if output is not None:
        with atomic_file(output) as file:
            file.write(text.encode())
        return
    if sys.stdout is None:
        raise OutputError("standard output is closed; redirect it to a file or a pipe")
    try:
        sys.stdout.write(_printable(text, sys.stdout))
        sys.stdout.flush()
    except OSError as error:
        abandon_stdout()
        if error.errno != errno.EPIPE:
            raise OutputError(
                f"standard output: cannot be written ({error.strerror or error}); redirect it elsewhere"
            ) from error


def abandon_stdout() -> None:
    """Let what is left for standard output go nowhere, so that Python's exit does not fail over it."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """A line for standard error; no work is lost because nobody can read it."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(_printable(text, sys.stderr) + "\n")
        sys.stderr.flush()


def tell(text: str) -> None:
    """A line about the work for standard error; nothing with --quiet."""
    if verbosity() is not Verbosity.quiet:
        say(text)


def _printable(text: str, stream: TextIO) -> str:
    """The text in letters that the stream has."""
    encoding = stream.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("─", "-").encode(encoding, errors="replace").decode(encoding)
    return text


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def gates_sheets(results: Sequence[GateResult]) -> list[Sheet]:
    """The table of all gates; none where there are none."""
    return [gates_table(results)] if results else []


def gates_document(results: Sequence[GateResult]) -> dict[str, Any]:
    """What a JSON document says of gates."""
    return {"gates": [asdict(result) for result in results], "passed": not missed(results)}


def refuse_missed(path: str, results: Sequence[GateResult]) -> None:
    """Make missed gates the command's exit code.

    Raises:
        GateFailed: if there are any.
    """
    if failed := missed(results):
        were = "were" if len(failed) > 1 else "was"
        raise GateFailed(f"{path}: {in_words(results)} {were} missed; the table of gates says by how much")
