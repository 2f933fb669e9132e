"""Files that appear whole or not at all."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from nestify.errors import OutputError


@contextmanager
def atomic_file(
    path: str | os.PathLike[str], check: Callable[[Path], object] | None = None
) -> Iterator[BinaryIO]:
    """Write a file that takes its place only when the block ends without an exception.

    The bytes go to a temporary file in the same folder, which is synced to disk and then renamed. After
    an exception the temporary file is removed; after a crash or a full disk, too, what was at `path` is
    unchanged. A symbolic link stays, and what it points to is replaced.

    Args:
        path: of the file.
        check: called with the path of the complete temporary file; the file takes its place only if this
            raises nothing.

    Raises:
        OutputError: if the file system refuses, or `path` is something else than a regular file.
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


def _refusal(name: str, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "make room" if full else "choose a folder that exists and can be written to"
    return OutputError(f"{name}: cannot be written ({reason}); {remedy}, what was there before is unchanged")


def _sync_folder(folder: Path) -> None:
    """Make the rename last. The file is in place either way: some network file systems cannot do this."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
