"""Writers that are killed, or whose disk is full: a file appears whole or not at all.

A job is one way of writing; a new writer is one more entry in `jobs`. Works where processes can be forked.
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
"""What a killed writer may leave behind."""

PATIENCE = 60.0
"""Seconds after which a child that does not answer counts as stuck."""


@dataclass(frozen=True)
class Job:
    """One way of writing a file.

    Attributes:
        old: the file's bytes before; None: there is no file.
        new: its bytes afterwards.
        write: writes to the path.
    """

    old: bytes | None
    new: bytes
    write: Callable[[Path], object]

    def prepare(self, path: Path) -> None:
        """Put what was there before in its place."""
        if self.old is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(self.old)


@dataclass(frozen=True)
class Aftermath:
    """What a killed writer left behind.

    Attributes:
        found: the file's bytes; None: there is none.
        left: sizes in bytes of temporary files.
        finished: whether the writer was done before it was killed.
    """

    found: bytes | None
    left: list[int]
    finished: bool


def jobs(folder: Path, weights: int) -> Mapping[str, Job]:
    """Every way of writing a nested file, with and without an older one.

    Args:
        folder: for the files that slices are made of, which stay.
        weights: of the network; the full file has some 4 bytes for each.
    """
    state, old = _state(weights, seed=1), b"an older file"
    whole, core = folder / "whole", folder / "core"

    def write(path: Path) -> object:
        return write_nested_file(path, state, description(3))

    def cut(path: Path) -> object:
        return slice_file(whole, 2, path)

    def upgrade(path: Path) -> object:
        return upgrade_slice(whole, 3, path)

    write(whole)
    slice_file(whole, 1, core)
    cut(folder / "cut")
    full, sliced, smallest = (path.read_bytes() for path in (whole, folder / "cut", core))
    return {
        "write": Job(None, full, write),
        "write over a file": Job(old, full, write),
        "slice": Job(None, sliced, cut),
        "slice over a file": Job(old, sliced, cut),
        "upgrade": Job(smallest, full, upgrade),
    }


def _state(weights: int, seed: int) -> NestedState:
    """Three levels of eight tensors, so that there is something to write at any time."""
    generator = torch.Generator().manual_seed(seed)
    shared = {f"w{i}": torch.randn(weights // 8, generator=generator) for i in range(8)}
    entry = {
        name: torch.randint(1, 4, tensor.shape, dtype=torch.uint8, generator=generator)
        for name, tensor in shared.items()
    }
    return NestedState(shared, EntryLevels(3, entry), [{}, {}, {}])


def kill_after(job: Job, path: Path, seconds: float) -> Aftermath:
    """Let a child of this process write, and kill it so many seconds after it began."""
    return _killed(job, path, lambda: None, seconds)


def kill_at(job: Job, path: Path, arrange: Callable[[], object]) -> Aftermath:
    """Let a child write that arranges for its own death beforehand."""
    return _killed(job, path, arrange, None)


def duration(job: Job, path: Path) -> float:
    """Seconds that the job takes in this process."""
    job.prepare(path)
    started = time.perf_counter()
    job.write(path)
    return time.perf_counter() - started


def die() -> None:
    """Kill this process as the kernel would: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def _killed(job: Job, path: Path, arrange: Callable[[], object], seconds: float | None) -> Aftermath:
    job.prepare(path)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def child() -> None:
        arrange()
        there.send(None)
        there.recv()  # the clock starts
        job.write(path)
        there.send(None)

    process = context.Process(target=child)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads in the parent: the child needs none
        process.start()
    there_is = _answer(here, PATIENCE)
    assert there_is, "the child did not start"
    here.send(None)
    if seconds is None:
        process.join(PATIENCE)
    else:
        time.sleep(seconds)
    finished = _answer(here, 0)
    process.kill()
    process.join(PATIENCE)
    here.close()
    return _look(path, finished)


def _answer(pipe: Any, patience: float) -> bool:
    try:
        if pipe.poll(patience):
            pipe.recv()
            return True
    except (EOFError, ConnectionResetError):  # the child is gone
        pass
    return False


def _look(path: Path, finished: bool) -> Aftermath:
    """What is there; temporary files are taken away, and nothing else may be there."""
    left = []
    for other in set(path.parent.iterdir()) - {path}:
        assert TEMPORARY.fullmatch(other.name), other
        left.append(other.stat().st_size)
        other.unlink()
    return Aftermath(path.read_bytes() if path.exists() else None, left, finished)
