"""JSON documents that are stored next to a nested file and say which file they belong to. No torch here.

They are not part of the nested file, whose header identifies the source of slices and must not change. Anyone
can have written them, so they are read with bounds.
"""

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from nestify.errors import BadFileError
from nestify.file.manifest import Sha256
from nestify.file.reader import NestedFile
from nestify.file.source import LocalFile
from nestify.file.untrusted import quoted, strict_json
from nestify.files import atomic_file, sibling


class Part(BaseModel):
    """A part of such a document: unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Document(Part):
    """A document next to a nested file.

    Attributes:
        header_sha256: SHA-256 of the nested file's first bytes, up to its data.
    """

    schema_version: Literal[1] = 1
    header_sha256: Sha256


AnyDocument = TypeVar("AnyDocument", bound=Document)


def document_path(file: NestedFile, ending: str) -> Path:
    """Return the path of a document next to a nested file: `net.bench.json` for the ending `.bench.json`."""
    return sibling(file.path, ending)


def header_sha256(file: NestedFile) -> str:
    """Return the hash by which a document names its nested file."""
    return sha256(file.source.read(0, file.header_bytes)).hexdigest()


def read_document(
    file: NestedFile,
    ending: str,
    kind: type[AnyDocument],
    max_bytes: int,
    check: Callable[[AnyDocument], None],
    what: str,
) -> AnyDocument | None:
    """Read the untrusted document next to a nested file; None if there is none, or the file has an address.

    Args:
        file: the nested file.
        ending: ending of the document's name.
        kind: class of the document.
        max_bytes: maximum size of the document.
        check: raises ValueError if the document does not fit the file, whose hash it names.
        what: what the document holds, for the message.

    Raises:
        BadFileError: if it is damaged, or not such a document.
    """
    place = document_path(file, ending)
    if not isinstance(file.source, LocalFile) or not os.path.exists(place):
        return None
    source = LocalFile(place)
    try:
        if source.size > max_bytes:
            raise ValueError(f"more than {max_bytes} bytes")
        content = strict_json(source.read(0, source.size).decode())
        document = kind.model_validate(content, strict=True)
        if document.header_sha256 == header_sha256(file):
            check(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _refusal(place, what, f"{quoted(where)}: {first['msg']}") from None
    except ValueError as error:
        raise _refusal(place, what, str(error)) from None
    return document


def write_document(file: NestedFile, ending: str, document: Document) -> Path:
    """Write a document next to a nested file atomically, and return its path.

    Raises:
        OutputError: if it cannot be written.
    """
    with atomic_file(place := document_path(file, ending)) as output:
        output.write((document.model_dump_json(indent=1) + "\n").encode())
    return place


def check_local(file: NestedFile, what: str) -> None:
    """Refuse to store something next to a file that has an address.

    Raises:
        BadFileError: if it has one.
    """
    if not isinstance(file.source, LocalFile):
        raise BadFileError(
            f"{file.name}: {what} are saved only next to a local file; leave --save out or download it"
        )


def _refusal(place: Path, what: str, reason: str) -> BadFileError:
    return BadFileError(f"{place}: holds no {what} that can be read ({reason}); remove it")
