"""Helpers that parse a small nested file, write it again with one defect, and check that it is refused."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nestify.errors import BadFileError
from nestify.file.reader import open_nested_file


@dataclass
class Parts:
    """A nested file as plain data.

    Attributes:
        header: JSON header without metadata.
        metadata: metadata of the header.
        manifest: the parsed manifest, which replaces the one in the metadata.
        data: the data bytes.
    """

    header: dict[str, Any]
    metadata: dict[str, Any]
    manifest: dict[str, Any]
    data: bytearray

    @classmethod
    def parse(cls, content: bytes) -> "Parts":
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        metadata = header.pop("__metadata__")
        data = bytearray(content[8 + length :])
        return cls(header, metadata, json.loads(metadata["nestify.manifest"]), data)

    @property
    def content(self) -> bytes:
        """Bytes of the file."""
        metadata = self.metadata | {"nestify.manifest": json.dumps(self.manifest)}
        return raw_content(json.dumps({"__metadata__": metadata} | self.header), bytes(self.data))

    def tensor(self, name: str) -> memoryview:
        """Return a tensor's bytes, writable in place."""
        begin, end = self.header[name]["data_offsets"]
        return memoryview(self.data)[begin:end]

    def parameter(self, name: str) -> dict[str, Any]:
        [entry] = [entry for entry in self.manifest["parameters"] if entry["name"] == name]
        return entry

    def rehash(self) -> None:
        """Recompute the hashes, as a forger would."""
        begin = 0
        for level in self.manifest["levels"]:
            end = begin + level["data_bytes"]
            level["sha256"] = hashlib.sha256(self.data[begin:end]).hexdigest()
            begin = end


def raw_content(header: str, data: bytes) -> bytes:
    """Return a file's bytes: the length of the header, the header and the data."""
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def take_apart(path: Path) -> Parts:
    return Parts.parse(path.read_bytes())


def put_together(parts: Parts, path: Path) -> None:
    path.write_bytes(parts.content)


def write_raw(path: Path, header: str, data: bytes) -> None:
    path.write_bytes(raw_content(header, data))


def damage(path: Path, change: Callable[[Parts], object]) -> None:
    """Rewrite a file with a change applied to its parts."""
    parts = take_apart(path)
    change(parts)
    put_together(parts, path)


def refusal(path: Path) -> str:
    """Return the one sentence, without the file's name, with which opening or reading fails."""
    with pytest.raises(BadFileError) as caught:
        open_nested_file(path).state()
    file_name, message = str(caught.value).split(": ", maxsplit=1)
    assert file_name == str(path)
    assert "\n" not in message
    assert "; " in message, "names a remedy"
    assert caught.value.exit_code == 3
    return message
