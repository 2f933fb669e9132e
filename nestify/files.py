"""Atomic writes of files and folders, names of the files of a run, and what a file is by its first bytes."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple
from uuid import uuid4

from nestify.errors import OutputError, RecipeError


@contextmanager
def atomic_file(
    path: str | os.PathLike[str], check: Callable[[Path], object] | None = None
) -> Iterator[BinaryIO]:
    """Write a file that is moved to its path only if the block ends without an exception.

    The bytes go to a temporary file in the same folder, which is synced to disk and then renamed. After
    an exception the temporary file is removed. An older file at `path` is unchanged also after a crash or a
    full disk. A symbolic link is kept, and its target is replaced.

    Args:
        path: path of the file.
        check: called with the path of the complete temporary file, which is moved only if it raises no
            exception.

    Raises:
        OutputError: if the file system refuses, or `path` is not a regular file.
    """
    name = os.fspath(path)
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise OutputError(f"{name}: is not a regular file; choose another path")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _refusal(name, error) from error
    temporary = target.with_name(f".{uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _refusal(name, error) from error
    finally:
        with suppress(OSError):  # gone after the rename
            temporary.unlink()


def _refusal(
    name: str, error: Exception, other: str = "choose a folder that exists and can be written to"
) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "make room" if full else other
    return OutputError(f"{name}: cannot be written ({reason}); {remedy}, what was there before is unchanged")


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that the rename is durable; some network file systems cannot do this."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def atomic_folder(path: Path, check: Callable[[Path], object]) -> Iterator[Path]:
    """Fill a folder that is moved to its path only if the block ends without an exception.

    The files go to a temporary folder next to it, which is then renamed. Folders cannot be exchanged
    atomically, so only an empty folder is replaced.

    Args:
        path: path of the folder, which does not exist or is empty.
        check: called with the path of the complete temporary folder, which is moved only if it raises no
            exception.

    Raises:
        OutputError: if the file system refuses.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{uuid4().hex}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        check(temporary)
        os.replace(temporary, target)
    except OutputError as error:  # of a file inside
        error.args = (str(error).replace(os.fspath(temporary), os.fspath(path)),)
        raise
    except OSError as error:
        raise _refusal(os.fspath(path), error, "choose a new folder in one that can be written to") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone after the rename


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that has files in it, and a path whose parent does not exist.

    Raises:
        OutputError: if it does, or cannot be looked at.
    """
    try:
        os.path.lexists(folder)  # ValueError for a NUL, which the methods of Path hide
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder}: is not an empty folder; give a new one")
        if not folder.absolute().parent.is_dir():
            raise OutputError(
                f"{folder}: its parent folder does not exist; create it, or choose another path"
            )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{folder}: cannot be accessed ({reason}); choose another path") from error


@contextmanager
def lock_output(output: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Keep other runs from writing the same output and logs until the end of the block.

    The lock is an advisory lock of the file `NAME.lock` next to the output. The system releases it when the
    process ends, however it ends. The file is removed at the end of the block, unless something is in it.

    Args:
        output: path of the nested file.
        warn: receives a warning if the file system has no locks; the block then runs without one.

    Raises:
        RecipeError: if another run holds the lock.
    """
    from filelock import FileLock, Timeout

    path = sibling(output, ".lock")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is not a regular file; remove it, or choose another output with -o")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RecipeError(
            f"another run is writing output = {output} and its logs; wait until it has ended, or choose "
            "another output with -o"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        warn(f"{path} cannot be locked ({reason}), so make sure that no other run writes {output}")
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):  # while it is locked, so that no other run loses a lock that it holds
            if not path.stat().st_size:  # a file with content is the user's, such as uv.lock
                path.unlink()
        lock.release()


def is_same_file(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths, links followed, lead to the same file, which need not exist."""
    try:
        return os.path.realpath(path) == os.path.realpath(other) or os.path.samefile(path, other)
    except (OSError, ValueError):  # one does not exist, or is no path, such as an address
        return False


def check_apart(output: str | os.PathLike[str], inputs: Mapping[str, str | os.PathLike[str] | None]) -> None:
    """Refuse to write to a file that is read, because what is in it would be lost.

    Args:
        output: the path to write.
        inputs: what messages call each file that is read, such as `the nested file`, and its path; None if
            it is not given.

    Raises:
        OutputError: if the output is one of them.
    """
    for what, path in inputs.items():
        if path is not None and is_same_file(output, path):
            raise OutputError(f"{os.fspath(output)}: is {what}; choose another path")


def is_special(path: Path) -> bool:
    """Whether a path is a pipe, a device or a socket, which may never end or keep a reader waiting."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def sibling(output: Path, ending: str) -> Path:
    """Return the path of another file of a run: `resnet.csv` for `resnet.nested.safetensors`."""
    return output.with_name(output.name.removesuffix(".safetensors").removesuffix(".nested") + ending)


def metrics_path(output: Path) -> Path:
    """Return the path of a run's log: `resnet.metrics.jsonl` for `resnet.nested.safetensors`."""
    return sibling(output, ".metrics.jsonl")


def checkpoint_path(output: Path) -> Path:
    """Return the path of a run's checkpoint: `resnet.resume.safetensors` for `resnet.nested.safetensors`."""
    return sibling(output, ".resume.safetensors")


class FileKind(NamedTuple):
    """What a file is.

    Attributes:
        name: what follows "is": an article and a noun.
        remedy: what the user can do about it; empty if that depends on what the file was given for.
    """

    name: str
    remedy: str = ""


_WEB_PAGE = FileKind("a web page", "download the file again: its address may need a token")

_STARTS = (
    (
        0,
        b"version ",
        FileKind("a pointer of Git LFS, not the file itself", "fetch it with git lfs pull"),
    ),
    (0, b"<!doctyp", _WEB_PAGE),
    (0, b"<html", _WEB_PAGE),
    (0, b"<?xml", FileKind("an XML file, such as an export to OpenVINO")),
    (0, b"PK\x03\x04", FileKind("a zip archive, such as a pt2 export or a checkpoint of torch.save")),
    (0, b"\x80", FileKind("a pickle, such as a checkpoint of torch.save")),
    (0, b"\x08", FileKind("no safetensors file, but probably an ONNX model")),
    (4, b"ET12", FileKind("an export to ExecuTorch")),
    (4, b"TFL3", FileKind("a LiteRT model")),
)


def recognise(first: bytes) -> FileKind | None:
    """Return the kind of a file, no safetensors file, that begins with these bytes; None if unknown.

    Args:
        first: at least eight bytes, as many as the length of a safetensors header takes.
    """
    lower = first.lower()
    return next((kind for at, start, kind in _STARTS if lower.startswith(start.lower(), at)), None)
