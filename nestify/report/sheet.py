"""A table that fits its place: a terminal of any width, a pipe, or Markdown. No torch here."""

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import JustifyMethod
from rich.table import Table

from nestify.recipe.recipe import flat_table

GAP = 2
FOLDED = 20
"""Terminal columns that names need where room is short; longer ones go on in the next line."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: its head; may break at its first space.
        cells: one per row.
        is_text: whether the cells are words, which stand on the left.
        rank: where room is short, the highest goes first; 0 always stays.
    """

    title: str
    cells: Sequence[str]
    is_text: bool = False
    rank: int = 0

    @property
    def broken(self) -> "Column":
        """The same with its title on two lines."""
        return Column(self.title.replace(" ", "\n", 1), self.cells, self.is_text, self.rank)

    @property
    def width(self) -> int:
        """Terminal columns that it takes in one line."""
        return max(map(cell_len, (*self.title.split("\n"), *self.cells)))

    @property
    def least_width(self) -> int:
        """Terminal columns that it cannot do without."""
        return min(self.width, FOLDED) if self.is_text else self.width


@dataclass(frozen=True)
class Sheet:
    """Columns side by side.

    Attributes:
        title: a line above them; empty for none.
    """

    columns: Sequence[Column]
    title: str = ""

    def fitted(self, width: int | None) -> tuple[Table, list[str]]:
        """The table for a terminal of so many columns, or at full width for None.

        Titles break onto two lines, then the least important columns go.

        Returns:
            The table, and the titles of the columns that were left out.
        """
        columns = list(self.columns)
        if width is None or _total([column.width for column in columns]) <= width:
            return _table(columns), []
        columns = [column.broken for column in columns]
        left_out: list[str] = []
        while _total([column.least_width for column in columns]) > width:
            least = max(columns, key=lambda column: column.rank)
            if not least.rank:
                break
            columns.remove(least)
            left_out.append(least.title.replace("\n", " "))
        return _table(columns), left_out

    def markdown(self) -> str:
        """Title and table in Markdown, every column of it."""
        columns = []
        for column in self.columns:
            cells = [text.replace("|", "\\|") for text in (column.title, *column.cells)]
            longest = max(map(cell_len, cells))
            pad = str.ljust if column.is_text else str.rjust
            rule = "-" * (longest - 1)
            head, *rest = (pad(cell, longest) for cell in cells)
            columns.append([head, f":{rule}" if column.is_text else f"{rule}:", *rest])
        table = "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
        return f"{self.title}\n\n{table}" if self.title else table


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
    """The options of a recipe, one after another: (`train.lr`, its value), as `--set` takes them."""
    for key, value in flat_table(recipe):
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def printable(text: str) -> str:
    """The text, with codes for the letters that would not show."""
    if text.isprintable():
        return text
    return "".join(_code(letter) if _is_hidden(letter) else letter for letter in text)


def _is_hidden(letter: str) -> bool:
    """Whether it is a control or format character, half a pair, without meaning yet, or ends a line."""
    return unicodedata.category(letter)[0] == "C" or letter in "\u2028\u2029"


def _code(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode() if letter > "\x7f" else f"\\x{ord(letter):02x}"
