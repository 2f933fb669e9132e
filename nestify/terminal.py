"""Where people see text: terminals, notebooks, and standard error."""

import sys
from contextlib import suppress
from importlib.util import find_spec
from typing import TextIO

from rich.console import Console


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is an open terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def can_show_bars(console: Console) -> bool:
    """Return whether progress bars can move on a console: at a terminal, or in a notebook with ipywidgets."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


def print_stderr(text: str) -> None:
    """Print a line on standard error; a standard error that is closed must not end the work."""
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
