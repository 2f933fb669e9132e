"""Where results go: standard output or a file; progress and messages go to standard error."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nestify.nested_file.atomic import atomic_file

WIDE = 250


def render(title: str, tables: Sequence[Table], notes: Sequence[str], *, wide: bool = False) -> str:
    """Tables and notes as text, as wide as the terminal, or as wide as they want where `wide`."""
    colour = sys.stdout.isatty() and not wide
    width = None if sys.stdout.isatty() and not wide else WIDE
    buffer = io.StringIO()
    console = Console(
        file=buffer, width=width, force_terminal=colour, color_system="auto" if colour else None
    )
    console.print(title, highlight=False, markup=False)
    for table in tables:
        console.print()
        console.print(table)
    console.print()
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    return "\n".join(lines).rstrip("\n") + "\n"


def write_result(text: str, output: Path | None) -> None:
    """Print a result, or write it to a file whole.

    Raises:
        OutputError: if the file cannot be written.
    """
    if output is None:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
        sys.stdout.flush()
        return
    with atomic_file(output) as file:
        file.write(text.encode())
