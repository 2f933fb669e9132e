"""Commands in processes of their own that are forked from a server with torch and nestify imported already.

The imports take four seconds of a processor. A test of a process's signals, streams or terminal does not need
them to happen again; a test of how the program starts uses `driver.spawn`.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import reduction
from pathlib import Path
from typing import Any, TextIO

from tests.training.processes import CONTEXT


class Forked:
    """A forked command, with the methods of `subprocess.Popen` that tests use.

    Args:
        words: the command line.
        variables: the environment.
        streams: file descriptors of its standard input, output and error; None is a new pipe, which the null
            device is for the input.
        start_new_session: whether it leads a session of its own.
        ignored: signals that it ignores from the beginning.
        before: a function of a module that it calls before the command.

    Attributes:
        pid: number of the process.
        stdout: what reads its standard output, if that is a new pipe.
        stderr: the same of its standard error.
        returncode: exit code, or minus a signal; None while it runs.
    """

    def __init__(
        self,
        words: Sequence[str],
        variables: Mapping[str, str],
        streams: Sequence[int | None] = (None, None, None),
        start_new_session: bool = False,
        ignored: Collection[int] = (),
        before: Callable[[], object] | None = None,
    ) -> None:
        null, given, made = os.open(os.devnull, os.O_RDONLY), list(streams), []
        readers: list[TextIO | None] = [None, None]
        for number in (1, 2):
            if given[number] is None:
                reader, given[number] = os.pipe()
                made.append(given[number])
                readers[number - 1] = open(reader)  # noqa: SIM115
        given[0] = null if given[0] is None else given[0]
        self.stdout, self.stderr = readers
        inherited = [_Inherited(number) for number in given if number is not None]
        arguments = (words, Path.cwd(), dict(variables), inherited, start_new_session, tuple(ignored), before)
        self._process = CONTEXT.Process(target=_run, args=arguments)
        self._process.start()
        for number in (null, *(number for number in made if number is not None)):
            os.close(number)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("nestify", timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read what is left in the new pipes, and wait; raises subprocess.TimeoutExpired."""
        with ThreadPoolExecutor() as pool:
            texts = [pool.submit(stream.read) if stream else None for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()  # or the pipes never end
                raise
        for stream in (self.stdout, self.stderr):
            if stream:
                stream.close()
        out, err = (text.result() if text else "" for text in texts)
        return out, err


class _Inherited:
    """A file descriptor of which a process gets a copy when it starts."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _take, (reduction.DupFd(self._number),)


def _take(copy: Any) -> int:
    number: int = copy.detach()
    return number


def _run(
    words: Sequence[str],
    folder: Path,
    variables: Mapping[str, str],
    streams: Sequence[int],
    start_new_session: bool,
    ignored: Sequence[int],
    before: Callable[[], object] | None,
) -> None:
    import torch

    from nestify.cli.app import main

    if start_new_session:
        os.setsid()
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # Python never closes the numbers of standard streams either, whatever takes the place of the objects.
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = ["nestify", *words]
    torch.set_num_threads(1)  # OMP_NUM_THREADS is read when torch is imported
    if before is not None:
        before()
    main()
