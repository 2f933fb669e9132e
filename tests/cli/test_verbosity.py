"""--quiet and --verbose, before and after the command."""

from pathlib import Path

import pytest

from nestify.training import display
from tests.cli.driver import QUICK, TWO_STEPS, UNTRAINED, at_terminal, finish, fork, nestify


@pytest.mark.parametrize(
    "words",  # test_next_steps.py has a run with the second one too
    [["-q", "compress"], pytest.param(["compress", "--quiet"], marks=pytest.mark.long)],
)
def test_quiet(words: list[str]) -> None:
    done = nestify(*words, "digits", *QUICK)
    assert (done.code, done.err) == (0, "")
    assert "Written: digits.nested.safetensors" in done.out


def test_quiet_prints_warnings_and_errors() -> None:
    done = nestify("compress", "digits", *TWO_STEPS, "-q")
    assert done.code == 0
    assert all(line.startswith("warning: ") for line in done.err.splitlines())
    assert nestify("-q", "report", "none").message.startswith("none")


def test_quiet_at_a_terminal() -> None:
    shown = "\n".join(at_terminal(80, "compress", "digits", *TWO_STEPS, "--quiet"))
    assert "train epoch" not in shown
    assert "Written" in shown


@pytest.mark.long
def test_verbose_prints_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.0)
    many = ("--epochs", "1", "--batch-size", "4", "--max-train", "84", "--max-val", "20", *UNTRAINED[6:])
    usual = nestify("compress", "digits", *many)
    verbose = nestify("compress", "digits", *many, "-v")
    assert usual.out == verbose.out
    assert usual.err.count("train epoch") == 1
    assert verbose.err.count("train epoch") > 1


def test_verbose_shows_what_libraries_log() -> None:
    done = finish(fork("--verbose", "compress", "digits", *QUICK))
    assert done.code == 0
    assert "fvcore.nn.precise_bn" in done.err


@pytest.mark.long
def test_quiet_picks_and_batches(digits_file: Path) -> None:
    done = nestify("-q", "pick", digits_file, "--max-bytes", "1GB")
    assert (done.code, done.err) == (0, "")
    assert done.out.strip().startswith("level")
    Path("few.toml").write_text(
        'extends = "digits"\n[schedule]\nfit = false\n[data]\nmax_train = 64\nmax_val = 20\n'
        "[train]\nepochs = 0\neval_before = false\nrecalibrate_batches = 1\n"
    )
    done = nestify("-q", "batch", "few.toml", "--out", "out")
    assert (done.code, done.err) == (0, "")
