"""Pipes whose reader is gone, full disks, and terminals that are closed, for every kind of command."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.driver import TWO_STEPS, environment, finish, fork, spawn

GUARDED = "from nestify.cli.streams import guard_streams\nguard_streams()\n"


def closed_pipe() -> int:
    """Return the write end of a pipe that has no reader."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def words_of(command: str, digits_file: Path) -> list[str]:
    return [str(digits_file) if word == "FILE" else word for word in command.split()]


COMMANDS = ("--help", "guide levels", "slice FILE --level 1 -o a", "report FILE --json")
FORKED = ("compress digits --dry-run",)
SLOW = ("doctor", "verify FILE", "batch --help", "--version", "guide", "report FILE --format html")


@pytest.mark.parametrize(
    "command", [*COMMANDS, *FORKED, *(pytest.param(c, marks=pytest.mark.long) for c in SLOW)]
)
def test_a_reader_that_is_gone_changes_nothing(command: str, digits_file: Path) -> None:
    writer = closed_pipe()
    words = words_of(command, digits_file)
    done = finish((fork if command in FORKED else spawn)(*words, stdout=writer))
    os.close(writer)
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize(
    "command",
    [
        *("--help", "guide levels"),
        *(pytest.param(command, marks=pytest.mark.long) for command in ("compress --help", "--version")),
    ],
)
def test_a_full_disk_is_reported_in_one_sentence(command: str) -> None:
    with open("/dev/full", "w") as full:
        done = finish(spawn(*command.split(), stdout=full))
    assert done.code == 3
    assert done.err.count("\n") == 1
    assert "No space left on device" in done.message
    assert "redirect it" in done.message


@pytest.mark.parametrize("command", ["--help", "guide"])
def test_a_standard_output_that_was_never_open(command: str) -> None:
    done = finish(spawn(*command.split(), stdout=None, preexec_fn=lambda: os.close(1)))
    assert done.code == 3
    assert done.err.count("\n") == 1
    assert "standard output is closed" in done.message


@pytest.mark.parametrize(
    ("command", "stream"),
    [
        pytest.param(
            command, stream, marks=() if "pipe" in stream or "nowhere" in command else pytest.mark.long
        )
        for command in ("unknown", "report", "report nowhere", "compress digits --epochs -1")
        for stream in ("pipe", "full", "closed")
    ],
)
def test_errors_keep_their_exit_code(command: str, stream: str) -> None:
    code = 3 if command == "report nowhere" else 2
    file = os.open("/dev/full", os.O_WRONLY) if stream == "full" else closed_pipe()
    if stream == "closed":
        done = finish(spawn(*command.split(), stderr=file, preexec_fn=lambda: os.close(2)))
    else:
        done = finish(fork(*command.split(), stderr=file))
    os.close(file)
    assert (done.code, done.out) == (code, "")


def test_both_streams_in_one_pipe() -> None:
    writer = closed_pipe()
    assert finish(spawn("compress", "--help", stdout=writer, stderr=writer)).code == 0
    os.close(writer)


def test_a_terminal_that_is_closed_does_not_stop_a_training(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = fork("compress", "digits", *TWO_STEPS, stderr=slave, start_new_session=True)
    os.close(slave)
    assert os.read(master, 100)
    os.close(master)
    assert finish(process).code == 0
    assert (tmp_path / "digits.nested.safetensors").exists()


def test_nohup_is_honoured(tmp_path: Path) -> None:
    process = fork("compress", "digits", *TWO_STEPS, ignored=[signal.SIGHUP])
    assert process.stderr is not None
    assert process.stderr.readline()
    process.send_signal(signal.SIGHUP)
    assert finish(process).code == 0
    assert (tmp_path / "digits.nested.safetensors").exists()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_is_flushed_at_exit(stream: str) -> None:
    code = f"{GUARDED}import sys\nprint('text', file=sys.{stream}, end='')"
    writer = closed_pipe()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    done = subprocess.run([sys.executable, "-c", code], env=environment(), check=False, **pipes)  # type: ignore[call-overload]
    os.close(writer)
    assert (done.returncode, done.stdout or b"", done.stderr or b"") == (0, b"", b"")


def test_files_do_not_get_the_numbers_of_closed_streams() -> None:
    code = f"{GUARDED}import os\nprint(os.open('/dev/null', os.O_RDONLY))"

    def close() -> None:
        os.close(0)
        os.close(2)

    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, preexec_fn=close, check=True, text=True
    )
    assert int(done.stdout) > 2


def test_a_pipe_that_does_not_block_gets_everything() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK)
    code = f"{GUARDED}print('x' * 10**6)"
    with subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=writer) as process:
        os.close(writer)
        time.sleep(0.5)  # the pipe, which holds 64 KiB, fills up
        with os.fdopen(reader) as file:
            assert len(file.read()) == 10**6 + 1
    assert process.returncode == 0
