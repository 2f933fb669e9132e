"""Tables that fit a terminal of any width, a pipe, or Markdown. No torch here."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import JustifyMethod
from rich.table import Table

from nestify.recipe.flat_options import flat_table
from nestify.text import printable

GAP = 2
"""Spaces between columns."""
FOLDED = 20
"""Terminal columns for text cells where room is short; longer texts are folded onto the next line."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Titles and cells may come from a file: characters that act on a terminal are escaped, and long texts cut.

    Attributes:
        title: heading; may break at its first space.
        cells: one text per row.
        is_text: whether the cells are words, which are aligned left; numbers are aligned right.
        rank: where room is short, the column with the highest rank is left out first; rank 0 always stays.
    """

    title: str
    cells: Sequence[str]
    is_text: bool = False
    rank: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", printable(self.title))
        object.__setattr__(self, "cells", [printable(cell) for cell in self.cells])

    @property
    def with_broken_title(self) -> "Column":
        """The column with its title on two lines."""
        broken = Column(self.title, self.cells, self.is_text, self.rank)
        object.__setattr__(broken, "title", self.title.replace(" ", "\n", 1))
        return broken

    @property
    def width(self) -> int:
        """Width of the column in terminal columns, without folding."""
        return max(map(cell_len, (*self.title.split("\n"), *self.cells)))

    @property
    def least_width(self) -> int:
        """Smallest width in terminal columns: text cells can be folded, numbers cannot."""
        return min(self.width, FOLDED) if self.is_text else self.width


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        columns: columns, from left to right.
        title: line above the table; empty for none.
    """

    columns: Sequence[Column]
    title: str = ""

    def fit(self, width: int | None) -> tuple[Table, list[str]]:
        """Return the table for a terminal of a given width.

        Where room is short, titles break onto two lines, then the least important columns are left out.

        Args:
            width: terminal columns; None for full width.

        Returns:
            The table, and the titles of the columns that were left out.
        """
        columns = list(self.columns)
        if width is None or _total([column.width for column in columns]) <= width:
            return _table(columns), []
        columns = [column.with_broken_title for column in columns]
        left_out: list[str] = []
        while _total([column.least_width for column in columns]) > width:
            least = max(columns, key=lambda column: column.rank)
            if not least.rank:
                break
            columns.remove(least)
            left_out.append(least.title.replace("\n", " "))
        return _table(columns), left_out

    def markdown(self, escape: Callable[[str], str] | None = None) -> str:
        """Return title and table as Markdown, with every column.

        Args:
            escape: escapes the text of the title and of each cell; None for `escape_markdown`.
        """
        escape = escape or escape_markdown
        columns = []
        for column in self.columns:
            cells = [escape(text) for text in (column.title, *column.cells)]
            longest = max(map(cell_len, cells))
            pad = str.ljust if column.is_text else str.rjust
            rule = "-" * (longest - 1)
            head, *rest = (pad(cell, longest) for cell in cells)
            columns.append([head, f":{rule}" if column.is_text else f"{rule}:", *rest])
        table = "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
        return f"{escape(printable(self.title))}\n\n{table}" if self.title else table


def escape_markdown(text: str) -> str:
    """Return a printable text whose cells, tags, code and links are not those of Markdown."""
    return _MARKDOWN.sub(r"\\\g<0>", text)


_MARKDOWN = re.compile(r"\\(?=\W)|[|<`]|(?<=\])\(")


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _table(columns: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for column in columns:
        justify: JustifyMethod = "left" if column.is_text else "right"
        table.add_column(
            column.title, justify=justify, vertical="bottom", no_wrap=not column.is_text, overflow="fold"
        )
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table


def settings(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the options of a recipe as `--set` takes them: pairs of dotted key (`train.lr`) and value."""
    for key, value in flat_table(recipe):
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
