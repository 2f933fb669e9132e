"""Sources of a nested file's bytes: one small interface, `read(offset, length)`."""

import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Protocol

from nestify.errors import BadFileError

PIECE_BYTES = 8 * 2**20
"""Largest number of bytes that are read at once, unless a range is needed in memory, and that a dropped
connection can cost."""


class ByteSource(Protocol):
    """Bytes that can be read in ranges.

    Attributes:
        name: what error messages call it.
        size: total number of bytes.
    """

    name: str
    size: int

    def read(self, offset: int, length: int) -> bytearray:
        """Return all bytes [offset, offset + length).

        Raises:
            BadFileError: if they cannot be read.
        """


def pieces(source: ByteSource, offset: int, length: int) -> Iterator[bytearray]:
    """Yield bytes [offset, offset + length) in order, piece by piece."""
    for begin, size in piece_ranges(offset, length):
        yield source.read(begin, size)


def piece_ranges(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of the pieces of a range."""
    end = offset + length
    for begin in range(offset, end, PIECE_BYTES):
        yield begin, min(PIECE_BYTES, end - begin)


class LocalFile:
    """A regular file on this machine, opened for each range, so that it need not be closed.

    Raises:
        BadFileError: on construction, if there is no such file, or it is not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        try:
            status = Path(path).stat()
        except FileNotFoundError:
            raise BadFileError(f"{self.name}: there is no such file; check the path") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise BadFileError(f"{self.name}: cannot be opened ({_reason(error)}); check the path") from None
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise BadFileError(f"{self.name}: is {kind}; give the nested file itself")
        self.size = status.st_size

    def read(self, offset: int, length: int) -> bytearray:
        """See `ByteSource.read`."""
        data = bytearray(length)
        try:
            with open(self.name, "rb") as file:
                file.seek(offset)
                found = file.readinto(data)
        except OSError as error:
            raise BadFileError(f"{self.name}: cannot be read ({_reason(error)}); check the file") from None
        if found != length:
            raise BadFileError(f"{self.name}: became shorter while it was read; read it again")
        return data


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


Mapped = memoryview | bytearray


def map_range(source: ByteSource, offset: int, length: int) -> Mapped:
    """Map bytes [offset, offset + length) of a source into memory.

    A local file is mapped directly; bytes of a server go through a temporary file. The memory can be written
    to, which changes no file.

    Raises:
        BadFileError: if they cannot be read.
    """
    if not length:
        return bytearray()
    try:
        if isinstance(source, LocalFile):
            with open(source.name, "rb") as file:
                return _map(file, offset, length)
        with TemporaryFile() as file:
            for piece in pieces(source, offset, length):
                file.write(piece)
            file.flush()
            return _map(file, 0, length)
    except ValueError:
        raise BadFileError(f"{source.name}: became shorter while it was read; read it again") from None
    except OSError as error:
        raise BadFileError(
            f"{source.name}: cannot be read ({error.strerror or error}); check the file, and that there is "
            "room for temporary files"
        ) from None


def release(data: Mapped, begin: int, end: int) -> None:
    """Free the memory of bytes that were used; they are read again if they are needed again.

    Args:
        data: what `map_range` returned, and nothing has written to.
        begin, end: the bytes.
    """
    if isinstance(data, memoryview) and isinstance(data.obj, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        offset = len(data.obj) - len(data)
        first = (offset + begin) // mmap.PAGESIZE * mmap.PAGESIZE
        data.obj.madvise(mmap.MADV_DONTNEED, first, offset + end - first)


def _map(file: IO[bytes], offset: int, length: int) -> memoryview:
    # A private copy on write, because torch warns about read-only memory.
    memory = mmap.mmap(file.fileno(), offset + length, access=mmap.ACCESS_COPY)
    return memoryview(memory)[offset:]
