"""A killed writer, a full disk or a system limit leaves the old file or the new one, never a partial file.

`tests/benchmarks/kill.py` kills many more writers.
"""

import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import pytest

from nestify import files as atomic
from nestify.errors import OutputError
from nestify.file.reader import open_nested_file
from tests.file.killing import Job, die, duration, jobs, kill_after, kill_at

JOBS = ["write", "write over a file", "slice", "slice over a file", "upgrade"]
PAGE = 4096


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Job]:
    """All jobs, with files of about 1 MiB."""
    return jobs(tmp_path_factory.mktemp("sources"), weights=2**18)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Path to write to, in an empty folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.safetensors"


def test_all_jobs_are_tested(table: Mapping[str, Job]) -> None:
    assert list(table) == JOBS
    assert {len(job.new) > 2**19 for job in table.values()} == {True}


@pytest.mark.parametrize("name", JOBS)
def test_killed_at_any_moment(table: Mapping[str, Job], path: Path, name: str) -> None:
    job = table[name]
    seconds = duration(job, path)
    assert path.read_bytes() == job.new
    rng = random.Random(name)
    for _ in range(4):
        aftermath = kill_after(job, path, rng.uniform(0, seconds))
        assert aftermath.found in (job.old, job.new)
        assert aftermath.found == job.new or not aftermath.finished
        assert len(aftermath.left) <= 1
    job.write(path)
    assert path.read_bytes() == job.new, "files left by a killed writer do no harm"
    open_nested_file(path).state()


# Killed at each step of `atomic_file`


def die_at_write(number: int) -> Callable[[], None]:
    """Return a function that makes the process kill itself before the `number`-th piece is written."""

    def arrange() -> None:
        vars(atomic)["open"] = lambda path, mode: Deadly(open(path, mode), number)  # noqa: SIM115

    return arrange


class Deadly:
    """A file that kills the process before its `number`-th write, after flushing what was written."""

    def __init__(self, file: BinaryIO, number: int) -> None:
        self._file, self._left = file, number

    def __enter__(self) -> "Deadly":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        self._left -= 1
        if not self._left:
            self._file.flush()
            die()
        return self._file.write(data)


def die_before(call: str) -> Callable[[], None]:
    """Return a function that makes the process kill itself before a call of a function of `os`."""
    return lambda: setattr(os, call, lambda *_: die())


def die_after(call: str) -> Callable[[], None]:
    """Return a function that makes the process kill itself right after a call of a function of `os`."""
    real = getattr(os, call)

    def dying(*arguments: object) -> None:
        real(*arguments)
        die()

    return lambda: setattr(os, call, dying)


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize(
    ("moment", "new", "left"),
    [
        (die_at_write(1), False, 1),
        (die_at_write(2), False, 1),
        (die_at_write(3), False, 1),
        (die_before("fsync"), False, 1),
        (die_before("replace"), False, 1),
        (die_after("replace"), True, 0),
    ],
    ids=["no byte", "the header", "some data", "all bytes", "before the rename", "after the rename"],
)
def test_killed_at_a_step(
    table: Mapping[str, Job], path: Path, name: str, moment: Callable[[], None], new: bool, left: int
) -> None:
    job = table[name]
    aftermath = kill_at(job, path, moment)
    assert not aftermath.finished
    assert aftermath.found == (job.new if new else job.old)
    assert len(aftermath.left) == left


# Full disks


def check_refused(job: Job, path: Path) -> None:
    """Check that writing fails with one sentence and leaves the folder unchanged."""
    job.prepare(path)
    before = set(path.parent.iterdir())
    with pytest.raises(OutputError, match="make room") as caught:
        job.write(path)
    check_message(caught.value, path)
    assert set(path.parent.iterdir()) == before
    assert (path.read_bytes() if path.exists() else None) == job.old


def check_message(error: OutputError, path: Path) -> None:
    message = str(error)
    assert message.startswith(f"{path}: cannot be written (")
    assert message.endswith("; make room, what was there before is unchanged")
    assert "\n" not in message
    assert error.exit_code == 3


def sizes_below(size: int, count: int) -> list[int]:
    """Return sizes from 0 to `size - 1`, both included."""
    return [size * step // count for step in range(count)] + [size - 1]


@pytest.mark.parametrize("name", JOBS)
def test_limit_of_the_system(table: Mapping[str, Job], path: Path, name: str) -> None:
    """The kernel refuses bytes of a file beyond a limit, which simulates a quota."""
    job = table[name]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in sizes_below(len(job.new), 12):
        check_refused(Job(job.old, job.new, limit_file_size(size, hard, job.write)), path)
    job.prepare(path)
    limit_file_size(len(job.new), hard, job.write)(path)
    assert path.read_bytes() == job.new
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == (soft, hard)


def limit_file_size(size: int, hard: int, write: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a writer that runs under a limit of `size` bytes per file."""

    def write_limited(path: Path) -> object:
        soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            return write(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return write_limited


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a small file system in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", folder):
        pytest.skip("a small file system cannot be mounted here; that takes Linux and root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def mount(*words: str | Path) -> int:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode


@pytest.mark.parametrize("name", JOBS)
def test_disk_that_fills_up(table: Mapping[str, Job], small_disk: Path, name: str) -> None:
    job, path = table[name], small_disk / "model.safetensors"
    old_bytes = -(-len(job.old or b"") // PAGE) * PAGE
    needed = old_bytes + -(-len(job.new) // PAGE) * PAGE
    for size in [old_bytes + PAGE, *(size for size in sizes_below(needed, 8) if size > old_bytes + PAGE)]:
        assert not mount("-o", f"remount,size={size - size % PAGE}", small_disk)
        check_refused(job, path)
    assert not mount("-o", f"remount,size={needed + PAGE}", small_disk)
    job.prepare(path)
    job.write(path)
    assert list(small_disk.iterdir()) == [path]
    assert path.read_bytes() == job.new


def test_disk_without_room_for_another_file(table: Mapping[str, Job], small_disk: Path) -> None:
    assert not mount("-o", "remount,size=16m,nr_inodes=2", small_disk)  # the folder and one file
    check_refused(table["write over a file"], small_disk / "model.safetensors")
