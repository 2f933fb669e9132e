"""Runs that end early: signals, bugs, too little memory."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import nestify as package
from nestify.cli import app
from nestify.cli.app import main
from nestify.compression import compress as api
from nestify.errors import UnsupportedModelError
from nestify.signals import STOP_SIGNALS
from tests.cli.driver import QUICK, Outcome, finish, fork, nestify


def stopped(number: int, *words: str) -> Outcome:
    """Run compress, end it by a signal after its first epoch, and check that no process is left."""
    endless = ("--epochs", "1000", "--max-train", "64", "--max-val", "10", "--set", "train.eval_before=false")
    process = fork("compress", "digits", *endless, *words, start_new_session=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("train epoch 1"):
            break
    process.send_signal(number)
    done = finish(process)
    assert done.out == ""
    for _ in range(100):  # helpers of multiprocessing end when they see that their parent has
        left = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, check=False).stdout
        if not left:
            break
        time.sleep(0.1)
    assert left == b""
    return done


@pytest.mark.parametrize(
    ("number", "code", "word", "workers"),
    [
        (signal.SIGINT, 130, "interrupted", "2"),
        *(  # test_resume.py ends a run by SIGTERM too
            pytest.param(number, 143, "terminated", "0", marks=pytest.mark.long)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
        ),
    ],
)
def test_signals_during_training(number: int, code: int, word: str, workers: str, tmp_path: Path) -> None:
    output = tmp_path / "digits.nested.safetensors"
    output.write_bytes(b"an older file")
    done = stopped(number, "--workers", workers)
    assert done.code == code
    assert re.fullmatch(
        rf"{word}; the same command resumes from step \d+ of 1000 of the training", done.message
    )
    assert output.read_bytes() == b"an older file"
    names = {output.name, "digits.metrics.jsonl", "digits.resume.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_signal_where_no_checkpoints_are_written(tmp_path: Path) -> None:
    done = stopped(signal.SIGTERM, "--set", "train.checkpoint_minutes=0")
    assert done.code == 143
    assert done.message == "terminated; no output was written"
    assert {path.name for path in tmp_path.iterdir()} == {"digits.metrics.jsonl"}


def test_a_bug_is_printed_with_how_to_report_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(api, "compress", break_down)
    done = nestify("compress", "digits", *QUICK)
    assert done.code == 70
    assert done.err.splitlines() == [
        f"nestify: this is a bug in nestify {package.__version__}: ZeroDivisionError: unforeseen",
        "please report it with the command and what it prints with --traceback",
    ]


def test_traceback_before_or_after_the_command() -> None:
    for words in (
        ("--traceback", "report", "nowhere"),
        ("report", "--traceback", "nowhere"),
        ("report", "nowhere", "--traceback"),
    ):
        done = nestify(*words)
        assert done.code == 3
        assert done.err.startswith("Traceback (most recent call last):\n")
        assert done.err.splitlines()[-1] == "nestify: nowhere: there is no such file; check the path"
    assert "Traceback" not in nestify("report", "nowhere").err


@pytest.mark.parametrize("ask", [lambda: torch.empty(2**58), lambda: bytearray(2**58)])
def test_too_little_memory(ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "compress", lambda *_, **__: ask())
    done = nestify("compress", "digits", *QUICK)
    assert done.code == 3
    assert done.message.startswith("out of memory: ")
    assert done.message.endswith("use a smaller --batch-size or --input-size")


CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


@pytest.fixture
def exit_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Runs the program as `python -m nestify compress digits` does, and returns its exit code."""
    monkeypatch.setattr("sys.argv", ["nestify", "compress", "digits", *QUICK])
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}

    def run_program() -> int:
        with pytest.raises(SystemExit) as stop:
            main()
        assert isinstance(stop.value.code, int)
        return stop.value.code

    yield run_program
    getattr(app, "_stops", []).clear()
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_before_any_work(
    number: int,
    code: int,
    exit_code: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("nestify.cli.app.take_verbosity", lambda words: signal.raise_signal(number))
    assert exit_code() == code
    assert capsys.readouterr().err.endswith("; no output was written\n")


@pytest.mark.parametrize(("number", "code"), CODES)
@pytest.mark.parametrize(
    "error", [UnsupportedModelError("not understood"), RuntimeError("no mode is active")]
)
def test_a_signal_that_a_library_replaces_by_its_own_error(
    error: Exception,
    number: int,
    code: int,
    exit_code: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As torch.export does, whose clean-up fails in the middle of a trace."""

    def fail(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(number)
        except BaseException:
            raise error from None

    monkeypatch.setattr(api, "compress", fail)
    assert exit_code() == code
    assert capsys.readouterr().err.endswith("; no output was written\n")


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("moment", ["atexit.register(stop)", "sys.stdout.flush = stop"])
def test_a_signal_at_the_exit_prints_no_traceback(moment: str, number: int) -> None:
    program = f"""
import atexit, signal, sys
from nestify.cli import app
def stop(): signal.raise_signal({int(number)})
def work(words): {moment}; return 0
app.run = work
app.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-number, "")
