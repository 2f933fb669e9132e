"""Titles, tables and notes as text for a terminal or a file, and as Markdown. No torch here."""

import io
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from rich.console import Console

from nestify.report.sheet import Sheet, escape_markdown
from nestify.terminal import is_terminal
from nestify.text import printable

WIDE = 10_000
"""Columns for output that is not fitted to a terminal: more than any table needs."""

LONGEST_NOTE = 3000
"""Characters of a note below the tables that are shown; some notes list names."""


class Screen(NamedTuple):
    """What is shown of a result.

    Attributes:
        title: first line.
        sheets: tables, in order.
        notes: lines below the tables.
    """

    title: str
    sheets: Sequence[Sheet] = ()
    notes: Sequence[str] = ()


def render(
    title: str,
    sheets: Sequence[Sheet],
    notes: Sequence[str],
    stream: TextIO | None,
    width: int | None = None,
) -> str:
    """Return title, tables and notes as printable text, fitted to a terminal or at full width.

    Args:
        title: first line.
        sheets: tables, in order.
        notes: lines below the tables.
        stream: where the text will be printed; None for a file. If it is a terminal, the text fits its width.
        width: columns, if it is not a terminal; None for full width.
    """
    terminal = Console(file=stream) if is_terminal(stream) else None
    width = terminal.width if terminal else width
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=width or WIDE,
        force_terminal=terminal is not None,
        force_jupyter=False,  # in a notebook, rich would display the text instead of writing it to the buffer
        color_system="auto" if terminal else None,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(printable(title))
    for sheet in sheets:
        table, left_out = sheet.fit(width)
        console.print()
        if sheet.title:
            console.print(printable(sheet.title))
        console.print(table)
        if left_out:
            console.print(f"(columns that do not fit: {', '.join(left_out)})")
    console.print()
    for note in notes:
        console.print(printable(note, LONGEST_NOTE))
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    return "\n".join(lines).rstrip("\n") + "\n"


def render_markdown(title: str, sheets: Sequence[Sheet], notes: Sequence[str]) -> str:
    """Return title, tables and notes as Markdown, with every column."""
    head = escape_markdown(printable(title))
    paragraphs = [escape_markdown(printable(note, LONGEST_NOTE)) for note in notes]
    return "\n\n".join([head, *(sheet.markdown() for sheet in sheets), *paragraphs]) + "\n"
