"""Byte layout: the position of each tensor in a nested file. Pure arithmetic, without torch or NumPy.

A nested file is a safetensors file in level-major order:

    [8-byte header length][JSON header][level 1 bytes][level 2 bytes] ... [level n bytes]

so that level k needs the header and the first `ends[k - 1]` data bytes. Every tensor and every level
begins 8-byte aligned. Safetensors requires tensors to tile the data without gaps, so padding bytes are small
U8 tensors such as `level1/pad/0`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from nestify.file.manifest import Manifest

Shape = tuple[int, ...]

FORMAT = "1"
FORMAT_KEY = "nestify.format"
MANIFEST_KEY = "nestify.manifest"

ALIGNMENT = 8
"""Tensors, levels and the data begin at multiples of this many bytes."""

MAX_HEADER_BYTES = 64 * 2**20

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element of every type that a nested file may hold, by safetensors' name."""

FILE_DTYPES = ("F32", "F16", "BF16")
"""Types that shared floating-point tensors may be stored in."""


@dataclass(frozen=True)
class TensorSpec:
    """A stored tensor without its position; `dtype` is safetensors' name of the type."""

    name: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Slot:
    """A stored tensor and its position, in bytes from the start of the data."""

    spec: TensorSpec
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.spec.nbytes


@dataclass(frozen=True)
class Layout:
    """Positions of all tensors, per level, core first; padding tensors included."""

    chunks: tuple[tuple[Slot, ...], ...]
    ends: tuple[int, ...]

    @property
    def slots(self) -> Iterator[Slot]:
        return (slot for chunk in self.chunks for slot in chunk)

    @property
    def chunk_bytes(self) -> list[int]:
        """Number of bytes of each level's own chunk."""
        return [end - begin for begin, end in zip((0, *self.ends), self.ends, strict=False)]


def values_name(level: int, parameter: str) -> str:
    """Return the name of the tensor with the values of a shared parameter that enter at a level."""
    return f"level{level}/values/{parameter}"


def entry_name(level: int, parameter: str) -> str:
    """Return the name of the tensor with the coded positions of those values (U8)."""
    return f"level{level}/entry/{parameter}"


def private_name(level: int, tensor: str) -> str:
    """Return the name of a tensor that belongs to one level."""
    return f"level{level}/private/{tensor}"


def pad_name(level: int, index: int) -> str:
    """Return the name of a level's padding tensor (U8), by its index."""
    return f"level{level}/pad/{index}"


def name_parts(name: str) -> tuple[str, str]:
    """Split a stored name into its kind (`values`, `entry`, `private` or `pad`) and the tensor's name."""
    _, kind, tensor = name.split("/", 2)
    return kind, tensor


def chunk_names(manifest: Manifest, level: int) -> Iterator[str]:
    """Yield the names of the tensors in a level's chunk, in file order, without padding.

    Shared parameters are in the manifest's order, each with its entry positions (if they are stored) before
    its values; private tensors follow. Nothing is stored for a maskable parameter of which no unit enters,
    nor for a shared tensor without elements.
    """
    for parameter in manifest.parameters:
        if parameter.maskable:
            if parameter.coding[level - 1] in ("bits", "elias-fano"):
                yield entry_name(level, parameter.name)
            if parameter.entering[level - 1]:
                yield values_name(level, parameter.name)
        elif level == 1 and 0 not in parameter.shape:
            yield values_name(level, parameter.name)
    for name in manifest.levels[level - 1].private:
        yield private_name(level, name)


def place(chunks: Sequence[Sequence[TensorSpec]]) -> Layout:
    """Lay the tensors of each level, core first, one after another, padded to the alignment."""
    offset = 0
    placed, ends = [], []
    for level, specs in enumerate(chunks, start=1):
        slots: list[Slot] = []
        pads = 0
        for spec in specs:
            slots.append(Slot(spec, offset))
            offset += spec.nbytes
            if gap := -offset % ALIGNMENT:
                slots.append(Slot(TensorSpec(pad_name(level, pads), "U8", (gap,)), offset))
                offset += gap
                pads += 1
        placed.append(tuple(slots))
        ends.append(offset)
    return Layout(tuple(placed), tuple(ends))


def manifest_text(manifest: Manifest) -> str:
    """Return the manifest as compact ASCII JSON with sorted keys; hashes do not change its length."""
    content = manifest.model_dump(mode="json")
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def encode_header(layout: Layout, manifest: Manifest) -> bytes:
    """Encode the file's first bytes: header length and header, padded so that the data begins aligned."""
    header: dict[str, object] = {
        "__metadata__": {FORMAT_KEY: FORMAT, MANIFEST_KEY: manifest_text(manifest)},
    }
    for slot in layout.slots:
        header[slot.spec.name] = {
            "dtype": slot.spec.dtype,
            "shape": slot.spec.shape,
            "data_offsets": (slot.begin, slot.end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
