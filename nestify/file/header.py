"""Parsing of an untrusted safetensors header.

No memory is allocated according to a number in the header.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nestify.file.layout import (
    DTYPE_BYTES,
    FORMAT,
    FORMAT_KEY,
    MANIFEST_KEY,
    MAX_HEADER_BYTES,
    Shape,
    Slot,
    TensorSpec,
)
from nestify.file.source import ByteSource
from nestify.file.untrusted import GET_ANOTHER, NOT_NESTED, Refusal, quoted, strict_json
from nestify.files import recognise

HEADER_LENGTH_BYTES = 8
MAX_DIMS = 16
MAX_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class Header:
    """The header of a nested file, whose tensors tile the data without gap or overlap.

    Attributes:
        manifest: the manifest's JSON text, not yet parsed.
        slots: type, shape and position of every tensor, by name, in file order.
        data_start: number of bytes before the data: header length and header.
        data_bytes: number of data bytes according to the header.
    """

    manifest: str
    slots: Mapping[str, Slot]
    data_start: int
    data_bytes: int


def read_header(source: ByteSource) -> Header:
    """Read the header, and check that it is a safetensors header of this format without gaps.

    Raises:
        Refusal: if it is not safetensors, not a nested file, of another format, or its tensors
            overlap or leave gaps.
        BadFileError: if the source cannot be read.
    """
    data = _header_bytes(source)
    content = _parse_header(data)
    manifest = _manifest_text(content.pop("__metadata__", {}))
    slots = [_parse_slot(name, entry) for name, entry in content.items()]
    slots.sort(key=lambda slot: (slot.begin, slot.end))
    return Header(
        manifest=manifest,
        slots={slot.spec.name: slot for slot in slots},
        data_start=HEADER_LENGTH_BYTES + len(data),
        data_bytes=_check_tiling(slots),
    )


def bounded_bytes(shape: Shape | list[int], dtype: str) -> int:
    """Return the bytes of a dense tensor with every dimension at least one, which bounds its strides too."""
    return math.prod(max(size, 1) for size in shape) * DTYPE_BYTES[dtype]


def _header_bytes(source: ByteSource) -> bytes:
    if source.size == 0:
        raise Refusal("is empty")
    if source.size < HEADER_LENGTH_BYTES:
        raise Refusal(f"has {source.size} bytes and is not a safetensors file", NOT_NESTED)
    start = bytes(source.read(0, HEADER_LENGTH_BYTES))
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        if kind := recognise(start):
            raise Refusal(f"is {kind.name}", kind.remedy or NOT_NESTED)
        raise Refusal(
            f"is not a safetensors file, or its header of {length} bytes is above the limit of 64 MiB",
            NOT_NESTED,
        )
    if HEADER_LENGTH_BYTES + length > source.size:
        raise Refusal(
            f"is truncated inside its header, with {source.size} of {HEADER_LENGTH_BYTES + length} bytes; no "
            "level is whole in it"
        )
    return bytes(source.read(HEADER_LENGTH_BYTES, length))


def _parse_header(data: bytes) -> dict[str, Any]:
    try:
        content = strict_json(data.decode())
    except ValueError as error:
        raise Refusal(f"has a header that is not valid JSON ({error})", NOT_NESTED) from None
    if not isinstance(content, dict) or not data.startswith(b"{"):
        raise Refusal("has a header that is not a JSON object", NOT_NESTED)
    return content


def _manifest_text(metadata: Any) -> str:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise Refusal("has __metadata__ that is not a table of strings")
    found = metadata.get(FORMAT_KEY)
    if found is None:
        raise Refusal(f"is a safetensors file but not a nested file (no {FORMAT_KEY})", NOT_NESTED)
    if found != FORMAT:
        newer = re.fullmatch("[0-9]{1,9}", found) and int(found) > int(FORMAT)
        remedy = "upgrade nestify" if newer else GET_ANOTHER
        raise Refusal(f"is of nested-file format {quoted(found)}; this nestify reads {FORMAT!r}", remedy)
    if MANIFEST_KEY not in metadata:
        raise Refusal(f"has no {MANIFEST_KEY}")
    text: str = metadata[MANIFEST_KEY]
    return text


def _parse_slot(name: str, entry: Any) -> Slot:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Refusal(f"tensor {quoted(name)} lacks one of dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        found = quoted(dtype) if isinstance(dtype, str) else "that is not a string"
        raise Refusal(f"tensor {quoted(name)} has dtype {found}, not one of {', '.join(DTYPE_BYTES)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS or bounded_bytes(shape, dtype) > MAX_INTEGER:
        raise Refusal(f"tensor {quoted(name)} has an impossible shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Refusal(f"tensor {quoted(name)} has impossible data_offsets")
    slot = Slot(TensorSpec(name, dtype, tuple(shape)), offsets[0])
    if slot.end != offsets[1]:
        raise Refusal(
            f"tensor {quoted(name)} has {offsets[1] - offsets[0]} bytes where its shape {shape} takes "
            f"{slot.spec.nbytes} of {dtype}"
        )
    return slot


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= MAX_INTEGER for v in values)


def _check_tiling(slots: list[Slot]) -> int:
    """Return the number of data bytes; refuse tensors that overlap or leave gaps."""
    end = 0
    for slot in slots:
        name = quoted(slot.spec.name)
        if slot.begin < end:
            raise Refusal(f"tensor {name} overlaps the tensor before it")
        if slot.begin > end:
            raise Refusal(
                f"tensor {name} is out of range: it begins at data byte {slot.begin}, after unused bytes "
                f"from {end} on"
            )
        end = slot.end
    return end
