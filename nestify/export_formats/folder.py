"""Folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from nestify.errors import OutputError


@contextmanager
def atomic_folder(path: Path, check: Callable[[Path], object]) -> Iterator[Path]:
    """Fill a folder that takes its place only when the block ends without an exception.

    The files go to a temporary folder beside it, which is then renamed. A folder cannot be exchanged for
    another at one stroke, so only an empty one is replaced.

    Args:
        path: of the folder; absent, or an empty folder.
        check: called with the path of the complete temporary folder; it takes its place only if this
            raises nothing.

    Raises:
        OutputError: if the file system refuses.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{uuid4().hex}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        check(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); choose a new folder in one that can "
            "be written to"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone after the rename
