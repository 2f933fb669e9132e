"""Text from elsewhere, made printable; the expected characters are those of Unicode's own lists."""

import sys
import unicodedata

import pytest

from nestify.errors import DataError, RecipeError
from nestify.text import LONGEST, printable, printable_lines, without_non_finite


@pytest.mark.parametrize(
    ("letter", "code"),
    [
        ("\x1b", r"\x1b"),  # begins the sequences that control a terminal
        ("\x9b", r"\x9b"),  # the same in one character
        ("\x00", r"\x00"),
        ("\x7f", r"\x7f"),
        ("\n", r"\x0a"),
        ("\r", r"\x0d"),
        ("\u2028", r"\u2028"),  # ends a line
        ("\u202e", r"\u202e"),  # right-to-left override
        ("\u2066", r"\u2066"),
        ("\u200f", r"\u200f"),
        ("\u061c", r"\u061c"),
        ("\u200b", r"\u200b"),  # without width
        ("\ufeff", r"\ufeff"),
        ("\u3164", r"\u3164"),  # a letter without ink
        ("\ud800", r"\ud800"),  # half a character
        ("\U000e0041", r"\U000e0041"),  # a tag
    ],
)
def test_characters_that_act_or_hide_are_escaped(letter: str, code: str) -> None:
    assert printable(f"a{letter}b") == f"a{code}b"


def test_every_control_and_format_character_is_escaped() -> None:
    for number in range(sys.maxunicode + 1):
        letter = chr(number)
        if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            assert printable(letter).isascii()
            assert printable(letter).startswith("\\")


@pytest.mark.parametrize(
    "text", ["", "stages.0.conv", "Käfer", "犬 🐕", "[red]x[/red] :dog:", "a\u00a0b", r"C:\new"]
)
def test_visible_text_stays(text: str) -> None:
    assert printable(text) == text
    assert printable(printable(text)) == text


def test_a_long_text_keeps_both_ends() -> None:
    shown = printable("a" * 10**6 + "z")
    assert len(shown) < LONGEST + 50
    assert shown.startswith("aaa")
    assert shown.endswith("az")
    assert "1,000,001 characters" in shown
    assert printable("a" * 1000, None) == "a" * 1000


def test_lines_stay_lines() -> None:
    assert printable_lines("one\n\ttwo\r\nthree") == "one\n\\x09two\\x0d\nthree"


def test_the_message_of_every_error_is_printable() -> None:
    error = DataError("photos\x1b[31m\nnestify: done")
    assert str(error) == r"photos\x1b[31m\x0anestify: done"
    assert len(str(DataError("x" * 10**6 + "; check the path"))) < 2000
    assert str(DataError("x" * 10**6 + "; check the path")).endswith("; check the path")


def test_the_problems_of_a_recipe_are_one_line_each() -> None:
    error = RecipeError(["one\nmore", "two"], "a\u202eb.toml")
    assert str(error).split("\n") == [r"a\u202eb.toml: one\x0amore", r"a\u202eb.toml: two"]
    many = str(RecipeError([f"problem {number}" for number in range(10_000)])).split("\n")
    assert len(many) < 100
    assert many[-1].endswith("other problems are not listed")


def test_json_has_neither_nan_nor_infinity() -> None:
    values = {
        "loss": float("nan"),
        "rows": [(1.5, float("inf")), {"x": -float("inf")}],
        "name": "nan",
        "n": 1,
    }
    due = {"loss": None, "rows": [[1.5, None], {"x": None}], "name": "nan", "n": 1}
    assert without_non_finite(values) == due
