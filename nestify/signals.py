"""Defer the signals that end a run until a checkpoint can be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = tuple(
    getattr(signal, name)
    # SIGHUP: the terminal was closed; SIGUSR1: sent before a pre-emption, for example by SLURM
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
)


class DeferredSignals:
    """The signals that arrived while they were deferred.

    Attributes:
        pending: number of the first signal that has not been delivered; None if there is none.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._handlers: dict[int, Any] = {}

    def deliver(self) -> None:
        """Deliver the deferred signal, or the one that was put into `pending`, if any."""
        if self.pending is None:
            return
        number, self.pending = self.pending, None
        self._restore()
        signal.raise_signal(number)
        self._install()  # the work continues if the handler returns

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.pending = number
        self._restore()  # so that a second signal ends the program at once

    def _install(self) -> None:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._handlers[number] = signal.signal(number, self._record)

    def _restore(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())


@contextmanager
def defer_signals() -> Iterator[DeferredSignals]:
    """Defer the first signal that would end the program to the end of the block; a second ends it at once.

    Does nothing in threads other than the main thread, because Python runs signal handlers only there.
    """
    deferred = DeferredSignals()
    if threading.current_thread() is not threading.main_thread():
        yield deferred
        return
    try:
        deferred._install()
        yield deferred
        deferred.deliver()
    finally:
        deferred._restore()


@contextmanager
def defer_child_signals() -> Iterator[None]:
    """Defer SIGCHLD, the signal that a child process has died, to the end of the block.

    When a worker process that loads images dies, PyTorch's handler raises an exception in the main thread,
    which must not happen in the middle of an optimizer step.
    """
    number = getattr(signal, "SIGCHLD", None)
    handler = None if number is None else signal.getsignal(number)
    if number is None or handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    died: list[bool] = []
    signal.signal(number, lambda *_: died.append(True))
    try:
        yield
    finally:
        signal.signal(number, handler)
        if died:
            signal.raise_signal(number)
