"""Standard output and standard error of a process, which must not end the work when nobody reads them."""

import errno
import io
import os
import select
import sys
from typing import Literal, TextIO

from nestify.errors import OutputError

_NAMES = {1: "standard output", 2: "standard error"}


def guard_streams() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams that a reader may close at any time.

    Everything that is printed goes through them: results, help, warnings, what libraries print, and what is
    flushed when Python exits. What a reader no longer takes is dropped, so a command ends as if all had been
    read. Standard error drops what cannot be written for any other reason too; standard output reports it.

    Raises (at a later write to standard output, once):
        OutputError: if standard output is closed, or cannot be written for another reason, such as a full
            disk.
    """
    for number in (0, 1, 2):  # a file that is opened later must not get one of these numbers
        _reserve(number)
    if _is_own(sys.stdout, 1):
        sys.stdout = _guarded(sys.stdout, 1)
    if _is_own(sys.stderr, 2):
        sys.stderr = _guarded(sys.stderr, 2)


def _is_own(stream: TextIO | None, number: int) -> bool:
    """Return whether a stream is the process's own, open or closed, and not one that a program put there."""
    try:
        return stream is None or stream.fileno() == number
    except (OSError, ValueError):
        return False


def _reserve(number: int) -> None:
    """Open the null device in place of a standard stream that is closed."""
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)


def _guarded(stream: TextIO | None, number: Literal[1, 2]) -> io.TextIOWrapper:
    """Return a stream with a standard stream's encoding and buffering; None is a closed one."""
    raw = _GuardedFile(number, is_closed=stream is None)
    unbuffered = bool(getattr(stream, "write_through", False))
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", None),
        errors=getattr(stream, "errors", None) or ("strict" if number == 1 else "backslashreplace"),
        line_buffering=unbuffered or bool(getattr(stream, "line_buffering", number == 2)),
        write_through=unbuffered,
    )


class _GuardedFile(io.FileIO):
    """File of a standard stream that drops bytes after its first failure.

    Args:
        number: 1 for standard output, 2 for standard error.
        is_closed: whether the process was started without this stream.
    """

    def __init__(self, number: Literal[1, 2], is_closed: bool) -> None:
        super().__init__(number, "wb", closefd=False)
        self._number = number
        self._is_closed = is_closed
        self._drops = False

    def write(self, data: object, /) -> int:
        """Write all bytes, or drop them; returns their number.

        Raises:
            OutputError: at the first failure of standard output that is not a closed pipe.
        """
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        if self._is_closed:
            self._fail(f"{_NAMES[self._number]} is closed; redirect it to a file or a pipe")
        done = 0
        while done < len(view) and not self._drops:
            try:
                written = super().write(view[done:])
            except OSError as error:
                if error.errno == errno.EPIPE:
                    self._drops = True
                else:
                    reason = error.strerror or error
                    self._fail(f"{_NAMES[self._number]}: cannot be written ({reason}); redirect it elsewhere")
            else:
                done += written or 0
                if written is None:  # a pipe that does not block, and is full
                    select.select([], [self], [])
        return len(view)

    def _fail(self, problem: str) -> None:
        """Drop everything from now on, and report the problem if results are lost."""
        reported, self._drops = self._drops, True
        if self._number == 1 and not reported:
            raise OutputError(problem)
