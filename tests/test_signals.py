"""Signals are put off, obeyed afterwards, and obeyed at once when they come twice."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from nestify.signals import STOP_SIGNALS, defer_child_signals, defer_signals


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """Numbers of the signals that the program's own handlers got."""
    numbers: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        numbers.append(number)

    old = {number: signal.signal(number, note) for number in (*STOP_SIGNALS, signal.SIGCHLD)}
    yield numbers
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_waits_until_it_is_asked_for(number: int, heard: list[int]) -> None:
    handler = signal.getsignal(number)
    with defer_signals() as stops:
        os.kill(os.getpid(), number)
        assert (stops.pending, heard) == (number, [])
        stops.deliver()
        assert (stops.pending, heard) == (None, [number])
        os.kill(os.getpid(), number)  # the handler let the work go on, so the next one waits too
        assert heard == [number]
    assert heard == [number, number]
    assert signal.getsignal(number) is handler


def test_a_second_signal_is_obeyed_at_once(heard: list[int]) -> None:
    with defer_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert heard == [signal.SIGINT]
    assert heard == [signal.SIGINT, signal.SIGTERM]


def test_ctrl_c_is_a_keyboard_interrupt_in_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), defer_signals():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_exception_puts_the_handlers_back(heard: list[int]) -> None:
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(ZeroDivisionError), defer_signals():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers


def test_what_is_ignored_stays_ignored(heard: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a job in the background
    with defer_signals() as stops:
        os.kill(os.getpid(), signal.SIGINT)
        assert stops.pending is None


def test_other_threads_handle_no_signals() -> None:
    entered: list[int | None] = []

    def work() -> None:
        with defer_signals() as stops, defer_child_signals():
            entered.append(stops.pending)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [None]


def test_children_wait(heard: list[int]) -> None:
    with defer_child_signals():
        os.kill(os.getpid(), signal.SIGCHLD)
        assert heard == []
    assert heard == [signal.SIGCHLD]
    with defer_child_signals():
        pass
    assert heard == [signal.SIGCHLD]


def test_the_tests_set_their_own_handlers() -> None:
    """Of a script, a background job ignores SIGINT, and so would every program that the tests start."""
    code = "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    inner = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        f"{__file__}::{SIGNAL_TEST}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", f"{code} sys.exit(subprocess.call({inner!r}))"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


SIGNAL_TEST = test_ctrl_c_is_a_keyboard_interrupt_in_the_end.__name__
