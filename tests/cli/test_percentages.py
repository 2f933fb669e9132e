"""Percentages and shares in flags of commands: refused with the value that was probably meant."""

from pathlib import Path

import pytest

from tests.cli.driver import QUICK, nestify


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("eval FILE --data embedded/digits --min-top1 0.7", "did you mean 70?"),
        ("pick FILE --min-top1 0.7", "did you mean 70?"),
        ("pick FILE --max-macs 0.5", "'0.5' is a share, not an amount"),
        ("eval FILE --data embedded/digits --cascade 80", "did you mean 0.8?"),
        ("eval FILE --data embedded/digits --cascade 80%", "did you mean 0.8?"),
        ("eval FILE --data embedded/digits --cascade macs=50%", "did you mean macs=0.5?"),
        ("compress digits --holdout 10%", "did you mean 0.1?"),
        ("compress digits --calibrate 5", "did you mean 0.05?"),
        ("compress digits --levels 95,80,0", "did you mean 0.95,0.8,0?"),
        ("compress digits --lr fast", "'fast' is not a number"),
    ],
)
def test_the_likely_value_is_suggested(
    words: str, meant: str, digits_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = nestify(*(str(digits_file) if word == "FILE" else word for word in words.split()))
    assert (done.code, done.out) == (2, "")
    assert meant in done.err


@pytest.mark.parametrize(("limit", "code"), [("70%", 0), ("0.7%", 0), ("100.0 %", 1), ("0", 0)])
def test_percent_signs_of_a_gate(limit: str, code: int, digits_file: Path) -> None:
    words = ("--data", "embedded/digits", "--max-images", "300", "--level", "1")
    assert nestify("eval", digits_file, *words, "--min-top1", limit).code == code


def test_a_budget_without_its_unit() -> None:
    words = ("--schedule", "channel", "--levels", "macs=25,1")
    done = nestify("compress", "digits", *QUICK, *words)
    assert done.code == 2
    assert "did you mean macs=0.25?" in done.message
