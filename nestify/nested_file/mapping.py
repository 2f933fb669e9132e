"""Ranges of a source as memory that the system pages in and drops again, instead of a copy."""

import mmap
from tempfile import TemporaryFile
from typing import IO

from nestify.errors import BadFileError
from nestify.nested_file.source import LocalFile, Source, pieces

Mapped = memoryview | bytearray


def mapped(source: Source, offset: int, length: int) -> Mapped:
    """Bytes [offset, offset + length) of a source.

    A local file is mapped where it lies; what comes from elsewhere goes through a temporary file. Writing
    to the memory is possible and changes no file.

    Raises:
        BadFileError: if they cannot be had.
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


def _map(file: IO[bytes], offset: int, length: int) -> memoryview:
    # A private copy on write: torch warns of memory that cannot be written to.
    memory = mmap.mmap(file.fileno(), offset + length, access=mmap.ACCESS_COPY)
    return memoryview(memory)[offset:]
