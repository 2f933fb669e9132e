"""Decoding of a checked nested file to dense tensors, one parameter at a time."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nestify.errors import BadFileError
from nestify.file.axes import axis_levels
from nestify.file.checks import units_left
from nestify.file.entry_codec import Entering, U8Array, decode, expand_units, unit_grid
from nestify.file.layout import Slot, entry_name, private_name, values_name
from nestify.file.manifest import Manifest, ParameterEntry
from nestify.file.source import map_range, piece_ranges, release
from nestify.file.tensors import TORCH_DTYPES, elements, from_bytes
from nestify.file.untrusted import GET_ANOTHER, quoted
from nestify.model.entry_levels import EntryLevels, NestedState, box_levels

if TYPE_CHECKING:
    from nestify.file.reader import NestedFile

SEGMENT = 2**17
"""Number of weights that are placed at a time, so that their positions fit into the processor's cache."""


class Chunk:
    """The verified bytes of one level, and the tensors in them.

    Args:
        level: number of the level, 1 for the core level.
        verify: whether to check its SHA-256.

    Raises:
        BadFileError: if it cannot be read, or its hash differs.
    """

    def __init__(self, file: "NestedFile", level: int, verify: bool) -> None:
        self.level = level
        self.file_name = file.source.name
        self._slots = {slot.spec.name: slot for slot in file.layout.chunks[level - 1]}
        self._begin, end = (0, *file.layout.ends)[level - 1 : level + 1]
        self._mapped = map_range(file.source, file.header_bytes + self._begin, end - self._begin)
        self._data: U8Array = np.frombuffer(self._mapped, np.uint8)
        entry = file.manifest.levels[level - 1]
        if verify and self._sha256() != entry.sha256:
            raise BadFileError(
                f"{self.file_name}: the bytes of level {level} ({entry.name}) do not match their SHA-256; "
                f"{GET_ANOTHER}"
            )

    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for begin, length in piece_ranges(0, self._data.size):
            digest.update(self._data[begin : begin + length].data)
            release(self._mapped, begin, begin + length)
        return digest.hexdigest()

    def release(self, parameter: str) -> None:
        """Free the memory of a parameter's bytes, which were used."""
        for name in (entry_name(self.level, parameter), values_name(self.level, parameter)):
            if slot := self._slots.get(name):
                release(self._mapped, slot.begin - self._begin, slot.end - self._begin)

    def bytes_of(self, name: str) -> U8Array:
        """Return the bytes of a tensor; empty if it is not stored, such as positions that need no bytes."""
        slot = self._slots.get(name)
        if slot is None:
            return np.empty(0, np.uint8)
        return self._data[slot.begin - self._begin : slot.end - self._begin]

    def tensor(self, name: str) -> Tensor:
        """Return a stored tensor, which shares the chunk's memory.

        Raises:
            BadFileError: if it holds a non-finite value.
        """
        slot: Slot = self._slots[name]
        try:
            return from_bytes(self.bytes_of(name), slot.spec.dtype, slot.spec.shape)
        except ValueError as error:
            raise self.refusal(name, str(error)) from None

    def refusal(self, name: str, problem: str) -> BadFileError:
        return BadFileError(f"{self.file_name}: tensor {quoted(name)} {problem}; {GET_ANOTHER}")


def read_state(file: "NestedFile", level: int, verify: bool, into: Mapping[str, Tensor]) -> NestedState:
    """See `NestedFile.state`."""
    chunks = _chunks(file, level, verify)
    parameters = file.manifest.parameters
    shared: dict[str, Tensor] = {}
    entry: dict[str, Tensor] = {}
    for parameter in parameters:
        found = into.get(parameter.name)
        if parameter.maskable:
            shared[parameter.name], levels = _maskable(parameter, chunks, found)
            entry[parameter.name] = torch.from_numpy(levels)
        else:
            shared[parameter.name] = _whole(parameter, chunks[0], found)
        for chunk in chunks:
            chunk.release(parameter.name)
    return NestedState(
        shared=shared,
        entry=EntryLevels(level, entry),
        private=[_private(file, chunk) for chunk in chunks],
        aliases={alias: entry.name for entry in parameters for alias in entry.aliases},
        units={entry.name: entry.unit for entry in parameters if entry.unit != (1, 1)},
        axes={entry.name: _axes(entry, level) for entry in parameters if entry.axes},
        skipped=_skipped(file.manifest, level),
    )


def _skipped(manifest: Manifest, level: int) -> list[list[str]]:
    skipped = [entry.skipped for entry in manifest.levels[:level]]
    return skipped if any(skipped) else []


def read_level(file: "NestedFile", level: int, verify: bool, into: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """See `NestedFile.level_tensors`."""
    chunks = _chunks(file, level, verify)
    tensors: dict[str, Tensor] = {}
    for parameter in file.manifest.parameters:
        found = into.get(parameter.name)
        if parameter.maskable:
            tensor = _maskable(parameter, chunks, found)[0]
        else:
            tensor = _whole(parameter, chunks[0], found)
        for chunk in chunks:
            chunk.release(parameter.name)
        tensors |= dict.fromkeys((parameter.name, *parameter.aliases), tensor)
    return tensors | _private(file, chunks[-1])


def _chunks(file: "NestedFile", level: int, verify: bool) -> list[Chunk]:
    """Read the first chunks; each is verified before anything in it is used."""
    return [Chunk(file, number, verify) for number in range(1, level + 1)]


def _maskable(
    parameter: ParameterEntry, chunks: Sequence[Chunk], found: Tensor | None
) -> tuple[Tensor, U8Array]:
    """Return a maskable parameter and its entry levels, both of its shape.

    A weight that no chunk uses is 0 and enters one level above the last chunk.

    Raises:
        BadFileError: if entry bits disagree with the number of values, or a value is not finite.
    """
    shape = tuple(parameter.shape)
    entering = _entering(parameter, chunks)
    units = box_levels(unit_grid(shape, parameter.unit), axis_levels(parameter, len(chunks))).reshape(-1)
    dense = _destination(parameter, found)
    if sum(parameter.entering[: len(chunks)]) < units.size:
        dense.zero_()
    places = _enter(units, entering, in_place=not parameter.axes)
    if parameter.unit == (1, 1):
        entry = units.reshape(shape)
    else:
        for _ in places:
            pass
        entry = expand_units(units, shape, parameter.unit)
        places = _entered(entry.reshape(-1), len(chunks))
    _place(parameter, chunks, dense, places)
    return dense, entry


Place = tuple[int, int, NDArray[np.intp]]
"""A level, the first element of a segment, and the elements of the segment that enter at the level."""


def _entering(parameter: ParameterEntry, chunks: Sequence[Chunk]) -> list[Entering | None]:
    """Yield per level which of the remaining units enter; None for all of them."""
    found: list[Entering | None] = []
    for chunk, (remaining, entering, coding) in zip(chunks, units_left(parameter), strict=False):
        if coding == "all":
            found.append(None)
            continue
        name = entry_name(chunk.level, parameter.name)
        try:
            found.append(decode(coding, chunk.bytes_of(name), remaining, entering))
        except ValueError as error:
            raise chunk.refusal(name, f"is damaged ({error})") from None
    return found


def _enter(units: U8Array, entering: Sequence[Entering | None], in_place: bool) -> Iterator[Place]:
    """Raise every unit from the level at which it becomes available to its entry level, yielding positions.

    Args:
        units: (units,), the lowest level at which each unit can still enter.
        in_place: whether all units are available at level 1, so that remaining units are contiguous.
    """
    seen = [0] * len(entering)
    for begin in range(0, units.size, SEGMENT):
        segment = units[begin : begin + SEGMENT]
        for level, enters in enumerate(entering, start=1):
            if level == 1 and in_place and enters is not None:
                chosen = enters.between(begin, begin + segment.size)
                segment.fill(2)
                segment[chosen] = 1
            else:
                left = segment == level
                chosen = np.flatnonzero(left)
                if enters is not None:
                    first, seen[level - 1] = seen[level - 1], seen[level - 1] + chosen.size
                    chosen = chosen[enters.between(first, seen[level - 1])]
                    segment += left
                    segment[chosen] = level
            yield level, begin, chosen


def _entered(entry: U8Array, n_levels: int) -> Iterator[Place]:
    """Yield the positions of weights whose entry levels are known."""
    for begin in range(0, entry.size, SEGMENT):
        segment = entry[begin : begin + SEGMENT]
        for level in range(1, n_levels + 1):
            yield level, begin, np.flatnonzero(segment == level)


def _place(
    parameter: ParameterEntry, chunks: Sequence[Chunk], dense: Tensor, places: Iterable[Place]
) -> None:
    """Write the values of every level, which are stored in C order, to their positions."""
    values = {
        chunk.level: chunk.tensor(values_name(chunk.level, parameter.name))
        for chunk, entering in zip(chunks, parameter.entering, strict=False)
        if entering
    }
    target = elements(dense)
    seen = dict.fromkeys(range(1, len(chunks) + 1), 0)
    for level, begin, chosen in places:
        if not chosen.size:
            continue
        part = values[level][seen[level] : seen[level] + chosen.size]
        seen[level] += chosen.size
        if part.numel() < chosen.size:
            break
        target[begin : begin + SEGMENT][chosen] = elements(part.to(dense.dtype))
    for chunk in chunks:
        stored = values[chunk.level].numel() if chunk.level in values else 0
        if seen[chunk.level] != stored:
            name = entry_name(chunk.level, parameter.name)
            raise chunk.refusal(name, f"names {seen[chunk.level]} weights where {stored} values are stored")


def _whole(parameter: ParameterEntry, chunk: Chunk, found: Tensor | None) -> Tensor:
    """Return a shared tensor without entry levels, which is not stored if it has no elements."""
    whole = _destination(parameter, found)
    return whole if 0 in parameter.shape else whole.copy_(chunk.tensor(values_name(1, parameter.name)))


def _axes(parameter: ParameterEntry, n_levels: int) -> dict[int, Tensor]:
    return {dim: torch.from_numpy(levels) for dim, levels in axis_levels(parameter, n_levels).items()}


def _private(file: "NestedFile", chunk: Chunk) -> dict[str, Tensor]:
    names = file.manifest.levels[chunk.level - 1].private
    return {name: chunk.tensor(private_name(chunk.level, name)).clone() for name in names}


def _destination(parameter: ParameterEntry, found: Tensor | None) -> Tensor:
    """Return the tensor to fill: the given one if it fits, or else a new one."""
    shape = tuple(parameter.shape)
    if found is not None and found.shape == shape and found.is_contiguous():
        return found.detach()
    return torch.empty(shape, dtype=TORCH_DTYPES[parameter.dtype])
