"""Signals that end a run, put off while a training cannot be kept."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1")  # SIGUSR1: sent ahead of a pre-emption, by SLURM for one
    if hasattr(signal, name)
)


class PutOff:
    """Signals that came while they were put off.

    Attributes:
        came: the first one; None while there was none.
    """

    def __init__(self) -> None:
        self.came: int | None = None
        self._handlers: dict[int, Any] = {}

    def act(self) -> None:
        """Let the signal that came do what it would have done; nothing where none came."""
        if self.came is None:
            return
        number, self.came = self.came, None
        signal.raise_signal(number)
        self._install()  # a handler that returns wants the work to go on

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = number
        self._restore()  # so that the next one ends the program at once

    def _install(self) -> None:
        for number in STOPS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._handlers[number] = signal.signal(number, self._note)

    def _restore(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())


@contextmanager
def put_off() -> Iterator[PutOff]:
    """Note the first signal that would end the program, instead of obeying it; a second one ends it at once.

    Does nothing outside the main thread, where Python handles no signals.
    """
    stops = PutOff()
    if threading.current_thread() is not threading.main_thread():
        yield stops
        return
    try:
        stops._install()
        yield stops
        stops.act()
    finally:
        stops._restore()


@contextmanager
def children_wait() -> Iterator[None]:
    """Hear of child processes that died when the block is over.

    PyTorch raises an exception wherever the main thread is when a process that loads images has died, which
    must not be in the middle of an optimizer's step.
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
