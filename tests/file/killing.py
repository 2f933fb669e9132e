"""Helpers that kill a process while it writes a file, to test that files are written atomically.

A job is one way of writing; add an entry to `jobs` for a new writer. Requires that processes can be forked.
"""

import multiprocessing
import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nestify.file.slicing import slice_file, upgrade_slice
from nestify.file.writer import write_nested_file
from nestify.model.entry_levels import EntryLevels, NestedState
from tests.file.builders import description

TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
"""Name of a temporary file that a killed writer may leave."""

PATIENCE = 60.0
"""Seconds after which a child that does not answer is considered stuck."""


@dataclass(frozen=True)
class Job:
    """One way of writing a file.

    Attributes:
        old: bytes of the file before writing; None if there is no file.
        new: bytes of the file after writing.
        write: function that writes to a path.
    """

    old: bytes | None
    new: bytes
    write: Callable[[Path], object]

    def prepare(self, path: Path) -> None:
        """Restore the state before writing at a path."""
        if self.old is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(self.old)


@dataclass(frozen=True)
class Aftermath:
    """State of the folder after a writer was killed.

    Attributes:
        found: bytes of the file; None if there is no file.
        left: sizes in bytes of the temporary files.
        finished: whether the writer finished before it was killed.
    """

    found: bytes | None
    left: list[int]
    finished: bool


def jobs(folder: Path, weights: int) -> Mapping[str, Job]:
    """Return every way of writing a nested file, with and without an existing file.

    Args:
        folder: folder for the files that slices are cut from; they are kept.
        weights: number of weights of the network; the full file has about 4 bytes per weight.
    """
    state, old = _state(weights, seed=1), b"an older file"
    source, core = folder / "source", folder / "core"

    def write(path: Path) -> object:
        return write_nested_file(path, state, description(3))

    def cut(path: Path) -> object:
        return slice_file(source, 2, path)

    def upgrade(path: Path) -> object:
        return upgrade_slice(source, 3, path)

    write(source)
    slice_file(source, 1, core)
    cut(folder / "cut")
    full, slice_bytes, smallest = (path.read_bytes() for path in (source, folder / "cut", core))
    return {
        "write": Job(None, full, write),
        "write over a file": Job(old, full, write),
        "slice": Job(None, slice_bytes, cut),
        "slice over a file": Job(old, slice_bytes, cut),
        "upgrade": Job(smallest, full, upgrade),
    }


def _state(weights: int, seed: int) -> NestedState:
    """Return three levels of eight tensors, so that writing takes many steps."""
    generator = torch.Generator().manual_seed(seed)
    shared = {f"w{i}": torch.randn(weights // 8, generator=generator) for i in range(8)}
    entry = {
        name: torch.randint(1, 4, tensor.shape, dtype=torch.uint8, generator=generator)
        for name, tensor in shared.items()
    }
    return NestedState(shared, EntryLevels(3, entry), [{}, {}, {}])


def kill_after(job: Job, path: Path, seconds: float) -> Aftermath:
    """Start a child process that writes, and kill it after the given number of seconds."""
    return _run_and_kill(job, path, lambda: None, seconds)


def kill_at(job: Job, path: Path, arrange: Callable[[], object]) -> Aftermath:
    """Start a child process that calls `arrange`, which makes it kill itself later, and then writes."""
    return _run_and_kill(job, path, arrange, None)


def duration(job: Job, path: Path) -> float:
    """Measure the seconds that the job takes in this process."""
    job.prepare(path)
    started = time.perf_counter()
    job.write(path)
    return time.perf_counter() - started


def die() -> None:
    """Kill this process with SIGKILL, so that nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def _run_and_kill(job: Job, path: Path, arrange: Callable[[], object], seconds: float | None) -> Aftermath:
    job.prepare(path)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def child() -> None:
        arrange()
        there.send(None)
        there.recv()  # the measured time begins
        job.write(path)
        there.send(None)

    process = context.Process(target=child)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads in the parent: the child uses none
        process.start()
    assert _has_answered(here, PATIENCE), "the child did not start"
    here.send(None)
    if seconds is None:
        process.join(PATIENCE)
    else:
        time.sleep(seconds)
    finished = _has_answered(here, 0)
    process.kill()
    process.join(PATIENCE)
    here.close()
    return _collect_aftermath(path, finished)


def _has_answered(pipe: Any, patience: float) -> bool:
    try:
        if pipe.poll(patience):
            pipe.recv()
            return True
    except (EOFError, ConnectionResetError):  # the child has ended
        pass
    return False


def _collect_aftermath(path: Path, finished: bool) -> Aftermath:
    """Return the state of the folder and remove temporary files; fail if there are unknown files."""
    left = []
    for other in set(path.parent.iterdir()) - {path}:
        assert TEMPORARY.fullmatch(other.name), other
        left.append(other.stat().st_size)
        other.unlink()
    return Aftermath(path.read_bytes() if path.exists() else None, left, finished)
