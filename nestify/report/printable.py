"""Texts of a file, which may be anybody's, as text that shows."""

import json
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from nestify.recipe.recipe import flat_table


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
