"""Signals are deferred and delivered afterwards; a second signal is delivered at once."""

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
def handled() -> Iterator[list[int]]:
    """The numbers of the signals that the program's own handlers received."""
    numbers: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        numbers.append(number)

    old = {number: signal.signal(number, record) for number in (*STOP_SIGNALS, signal.SIGCHLD)}
    yield numbers
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_waits_until_it_is_delivered(number: int, handled: list[int]) -> None:
    handler = signal.getsignal(number)
    with defer_signals() as deferred:
        os.kill(os.getpid(), number)
        assert (deferred.pending, handled) == (number, [])
        deferred.deliver()
        assert (deferred.pending, handled) == (None, [number])
        os.kill(os.getpid(), number)  # the handler returned, so the next signal is deferred too
        assert handled == [number]
    assert handled == [number, number]
    assert signal.getsignal(number) is handler


def test_a_signal_of_another_process_is_delivered(handled: list[int]) -> None:
    """As where several processes agree to stop, and this one received no signal itself."""
    with defer_signals() as deferred:
        deferred.pending = signal.SIGTERM
        deferred.deliver()
        assert (deferred.pending, handled) == (None, [signal.SIGTERM])
        os.kill(os.getpid(), signal.SIGINT)
        assert (deferred.pending, handled) == (signal.SIGINT, [signal.SIGTERM])
    assert handled == [signal.SIGTERM, signal.SIGINT]


def test_a_second_signal_is_delivered_at_once(handled: list[int]) -> None:
    with defer_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert handled == [signal.SIGINT]
    assert handled == [signal.SIGINT, signal.SIGTERM]


def test_ctrl_c_raises_keyboard_interrupt_at_the_end_of_the_block() -> None:
    with pytest.raises(KeyboardInterrupt), defer_signals():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_exception_restores_the_handlers(handled: list[int]) -> None:
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(ZeroDivisionError), defer_signals():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers


def test_an_ignored_signal_stays_ignored(handled: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job of a shell script
    with defer_signals() as deferred:
        os.kill(os.getpid(), signal.SIGINT)
        assert deferred.pending is None


def test_other_threads_handle_no_signals() -> None:
    entered: list[int | None] = []

    def work() -> None:
        with defer_signals() as deferred, defer_child_signals():
            entered.append(deferred.pending)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [None]


def test_child_signals_are_deferred(handled: list[int]) -> None:
    with defer_child_signals():
        os.kill(os.getpid(), signal.SIGCHLD)
        assert handled == []
    assert handled == [signal.SIGCHLD]
    with defer_child_signals():
        pass
    assert handled == [signal.SIGCHLD]


@pytest.mark.long
def test_the_tests_set_their_own_handlers() -> None:
    """A background job of a shell script ignores SIGINT, and so would every program that the tests start."""
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


SIGNAL_TEST = test_ctrl_c_raises_keyboard_interrupt_at_the_end_of_the_block.__name__
