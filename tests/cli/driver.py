"""Run the command line: in this process for speed, or in its own process where that matters."""

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nestify.cli.app import run
from nestify.file.reader import open_nested_file
from nestify.training.stepper import Stepper
from tests.cli.forked import Forked

UNTRAINED = (
    *("--epochs", "0", "--max-train", "200", "--max-val", "100"),
    *("--set", "train.recalibrate_batches=2", "--set", "train.eval_before=false"),
    *("--set", "schedule.fit=false"),
)
"""Options of a run without training, which takes about a second."""

QUICK = (*UNTRAINED, "--max-train", "64", "--max-val", "20")
"""The same in half the time, for tests that read no accuracies."""

TWO_STEPS = (
    *("--epochs", "0.3", "--batch-size", "32", "--max-train", "200", "--max-val", "50"),
    *("--set", "train.recalibrate_batches=2", "--set", "train.eval_before=false"),
)
"""Options of a run of two training steps: 0.3 of an epoch of six, rounded up."""

DIGITS = Path(__file__).parents[2] / "nestify" / "recipes" / "digits"
CHECKPOINT = DIGITS / "test_resnet.safetensors"


@dataclass(frozen=True)
class Outcome:
    """Result of a command: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output, which must be one JSON document."""
        return json.loads(self.out)

    @property
    def message(self) -> str:
        """The error message: the last line of standard error, without the program's name."""
        last = self.err.splitlines()[-1]
        assert last.startswith("nestify: "), self.err
        assert "Traceback" not in self.err
        return last.removeprefix("nestify: ")


def nestify(*words: str | os.PathLike[str]) -> Outcome:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run([os.fspath(word) for word in words])
    return Outcome(code, out.getvalue(), err.getvalue())


def interrupt(steps: int, *words: str | os.PathLike[str]) -> Outcome:
    """Run a command in this process, and interrupt it as Ctrl-C does during its step of this number."""
    original, begun = Stepper.step, 0

    def counted(self: Stepper, *given: Any) -> None:
        nonlocal begun
        begun += 1
        if begun == steps:
            signal.raise_signal(signal.SIGINT)
        original(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", counted)
        return nestify(*words)


def spawn(*words: str | os.PathLike[str], **options: Any) -> "subprocess.Popen[str]":
    """Start a command in its own process, with pipes for its output."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    return subprocess.Popen([sys.executable, "-m", "nestify", *map(os.fspath, words)], **{**pipes, **options})


def fork(
    *words: str | os.PathLike[str], stdout: int | None = None, stderr: int | None = None, **options: Any
) -> Forked:
    """Start a command in its own process as `spawn` does, but without the imports; see `Forked`."""
    return Forked([*map(os.fspath, words)], environment(), (None, stdout, stderr), **options)


def at_terminal(width: int, *words: str | Path, program: Sequence[str] = ()) -> list[str]:
    """Run a command at a terminal and return the lines that it prints, without escape sequences.

    Args:
        width: columns of the terminal.
        words: the command line.
        program: arguments of Python that run something else than nestify.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    process: subprocess.Popen[bytes] | Forked
    if program:
        command = [sys.executable, *program, *map(str, words)]
        process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment())
    else:
        process = Forked([*map(str, words)], environment(), (slave, slave, slave))
    os.close(slave)
    shown = b""
    while True:
        try:
            block = os.read(master, 2**16)
        except OSError:  # the other side has closed
            break
        if not block:
            break
        shown += block
    os.close(master)
    assert process.wait() == 0
    return (
        re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
        .replace("\r\n", "\n")
        .replace("\r", "\n")
        .split("\n")
    )


def environment(**changes: str) -> Mapping[str, str]:
    """Return this process's environment without the variables that affect how a terminal is detected."""
    seen = ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TERM")
    kept = {name: value for name, value in os.environ.items() if name not in seen}
    return {**kept, "OMP_NUM_THREADS": "1", "TERM": "xterm", **changes}


def finish(process: "subprocess.Popen[str] | Forked", timeout: float = 60) -> Outcome:
    """Wait for a spawned command and return its result."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode is not None
    return Outcome(process.returncode, out or "", err or "")


def stored_recipe(path: Path) -> dict[str, Any]:
    """Return the recipe that is stored in a nested file."""
    return open_nested_file(path).manifest.recipe


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return the events of one kind in a run's `metrics.jsonl`."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]
