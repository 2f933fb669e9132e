"""Where people see text: terminals, notebooks, standard error, and Python's warnings."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, TextIO

from rich.console import Console

from nestify.errors import NestifyWarning
from nestify.text import printable_lines

Progress = Callable[[int, int], object]
"""Called with the amount of work that is done, and with the total; the total is 0 if it is not known."""


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is an open terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def can_show_bars(console: Console) -> bool:
    """Return whether progress bars can move on a console: at a terminal, or in a notebook with ipywidgets."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


Unit = Literal["bytes", "images", "candidates"]
"""What a bar counts."""


def shown_progress(progress: Progress | None, unit: Unit) -> AbstractContextManager[Progress]:
    """Return a context that yields a caller's progress function, or one that moves a bar if there is none."""
    return progress_bar(unit) if progress is None else nullcontext(progress)


@contextmanager
def progress_bar(unit: Unit, *, hidden: bool = False) -> Iterator[Progress]:
    """Show a bar on standard error where bars can move, until the context ends.

    Args:
        unit: what is counted.
        hidden: whether to show nothing.

    Yields:
        The function that moves the bar.
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = {
        "bytes": (DownloadColumn(True), TransferSpeedColumn()),
        **{name: (MofNCompleteColumn(), TextColumn(name)) for name in ("images", "candidates")},
    }
    hidden = hidden or not can_show_bars(console)
    shown = (BarColumn(bar_width=20), *columns[unit], TimeRemainingColumn())
    with Bar(*shown, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


def print_stderr(text: str, *, rendered: bool = False) -> None:
    """Print lines on standard error; a standard error that is closed must not end the work.

    Args:
        text: the lines; everything in them that is not visible is escaped.
        rendered: whether they come from `render`, which has escaped them and may have added styles.
    """
    text = text if rendered else printable_lines(text)
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(encodable(text, sys.stderr) + "\n")
        sys.stderr.flush()


def encodable(text: str, stream: TextIO) -> str:
    """Return the text with the characters that the stream's encoding lacks replaced."""
    encoding = stream.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("─", "-").encode(encoding, errors="replace").decode(encoding)
    return text


@dataclass(frozen=True)
class Caller:
    """A line of a program that called nestify.

    Attributes:
        file: path of its file.
        line: number of the line, from 1.
    """

    file: str
    line: int

    def warn(self, text: str) -> None:
        """Issue a `NestifyWarning` at this line, also if the same one was issued before."""
        warnings.warn_explicit(text, NestifyWarning, self.file, self.line)


def find_caller() -> Caller:
    """Return the innermost line on the stack that is not code of nestify."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "nestify":
        frame = frame.f_back
    return Caller(frame.f_code.co_filename, frame.f_lineno)
