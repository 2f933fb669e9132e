"""Text from elsewhere, made fit to be shown: no character acts on a terminal, hides, or changes the order.

File names, names in nested files, and the messages of libraries can hold any character. Escaping is done
where text leaves the program: in the message of every error, in table cells, and on standard error.
"""

import re
import unicodedata
from math import isfinite
from typing import Any

from nestify.addresses import hide_passwords

LONGEST = 300
"""Characters of a name, a value or a library's message that are shown."""

LONGEST_MESSAGE = 1500
"""Characters of one sentence of an error message that are shown."""

_INVISIBLE = "\u034f\u115f\u1160\u17b4\u17b5\u2028\u2029\u2800\u3164\uffa0"
"""Characters without any ink, and ends of lines, that Unicode counts as letters, marks or separators."""

_ANY_INVISIBLE = re.compile(f"[{_INVISIBLE}]")


def printable(text: str, longest: int | None = LONGEST) -> str:
    """Return a text as one line of visible characters.

    Controls (also those that end a line), marks that change the direction of a text, characters without
    width, lone surrogates and unassigned codes are replaced by their escape codes, such as `\\x1b`. Users and
    passwords in addresses are left out.

    Args:
        text: any text.
        longest: number of characters to keep; a longer text lacks its middle. None for any number.
    """
    text = hide_passwords(text)
    if longest is not None and len(text) > longest:
        end = longest // 4
        text = f"{text[: longest - end]} ...({len(text):,} characters)... {text[-end:]}"
    if text.isprintable() and not _ANY_INVISIBLE.search(text):
        return text
    return "".join(_code(letter) if _is_hidden(letter) else letter for letter in text)


def printable_lines(text: str) -> str:
    """Return a text of several lines with all other invisible characters escaped; see `printable`."""
    return "\n".join(printable(line, None) for line in text.split("\n"))


def _is_hidden(letter: str) -> bool:
    """Return whether a character is a control, format, surrogate or unassigned code, or has no ink."""
    return unicodedata.category(letter)[0] == "C" or letter in _INVISIBLE


def _code(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode() if letter > "\x7f" else f"\\x{ord(letter):02x}"


def without_non_finite(value: Any) -> Any:
    """Return plain values with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_non_finite(item) for key, item in value.items()}
    return list(map(without_non_finite, value)) if isinstance(value, list | tuple) else value
