"""From a checked nested file to dense tensors, one level's chunk at a time."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nestify.errors import BadFileError
from nestify.nested_file.checks import units_left
from nestify.nested_file.entry_codec import U8Array, decode, expand_units, unit_grid
from nestify.nested_file.layout import Slot, entry_name, private_name, values_name
from nestify.nested_file.manifest import ParameterEntry
from nestify.nested_file.refusal import GET_ANOTHER
from nestify.nested_file.state import NestedState
from nestify.nested_file.strict_json import quoted
from nestify.nested_file.tensors import TORCH_DTYPES, elements, from_bytes
from nestify.nesting import EntryLevels

if TYPE_CHECKING:
    from nestify.nested_file.reader import NestedFile


class Chunk:
    """One level's bytes, verified, and the tensors in them.

    Args:
        level: its number, 1 for the core.
        verify: whether to check its SHA-256.

    Raises:
        BadFileError: if it cannot be read or its hash disagrees.
    """

    def __init__(self, file: "NestedFile", level: int, verify: bool) -> None:
        self.level = level
        self.file_name = file.source.name
        self._slots = {slot.spec.name: slot for slot in file.layout.chunks[level - 1]}
        self._begin, end = (0, *file.layout.ends)[level - 1 : level + 1]
        data = file.source.read(file.header_bytes + self._begin, end - self._begin)
        self._data: U8Array = np.frombuffer(data, np.uint8)
        entry = file.manifest.levels[level - 1]
        if verify and hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BadFileError(
                f"{self.file_name}: the bytes of level {level} ({entry.name}) do not match their SHA-256; "
                f"{GET_ANOTHER}"
            )

    def bytes_of(self, name: str) -> U8Array:
        """(bytes,) of a tensor; empty where it is not stored, as for entry positions that need none."""
        slot = self._slots.get(name)
        if slot is None:
            return np.empty(0, np.uint8)
        return self._data[slot.begin - self._begin : slot.end - self._begin]

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, sharing the chunk's memory.

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


class MaskableTensor:
    """A dense tensor and its entry levels, filled level by level.

    Attributes:
        dense: of the parameter's shape, 0 where no level read so far uses a weight.
    """

    def __init__(self, parameter: ParameterEntry, n_levels: int) -> None:
        self.parameter = parameter
        self.shape = tuple(parameter.shape)
        self.dense = torch.zeros(self.shape, dtype=TORCH_DTYPES[parameter.dtype])
        self._unused = n_levels + 1
        self._units = np.full(unit_grid(self.shape, parameter.unit), self._unused, np.uint8).reshape(-1)
        self._plan = list(units_left(parameter))

    def fill(self, chunk: Chunk) -> None:
        """Place the values that enter at the chunk's level.

        Raises:
            BadFileError: if entry bits disagree with the number of values, or a value is not finite.
        """
        remaining, entering, coding = self._plan[chunk.level - 1]
        if not entering:
            return
        name = entry_name(chunk.level, self.parameter.name)
        try:
            enters = decode(coding, chunk.bytes_of(name), remaining, entering)
        except ValueError as error:
            raise chunk.refusal(name, f"is damaged ({error})") from None
        self._units[self._units == self._unused] = np.where(
            enters, np.uint8(chunk.level), np.uint8(self._unused)
        )
        mask = expand_units(self._units == chunk.level, self.shape, self.parameter.unit).reshape(-1)
        values = chunk.tensor(values_name(chunk.level, self.parameter.name))
        if np.count_nonzero(mask) != values.numel():
            problem = f"names {np.count_nonzero(mask)} weights where {values.numel()} values are stored"
            raise chunk.refusal(name, problem)
        elements(self.dense)[mask] = elements(values)

    @property
    def entry(self) -> Tensor:
        """Entry levels, uint8 of the parameter's shape."""
        return torch.from_numpy(expand_units(self._units, self.shape, self.parameter.unit))


def read_state(file: "NestedFile", level: int, verify: bool) -> NestedState:
    """See `NestedFile.state`."""
    parameters = file.manifest.parameters
    maskable = {entry.name: MaskableTensor(entry, level) for entry in parameters if entry.maskable}
    shared = {name: tensor.dense for name, tensor in maskable.items()}
    private = []
    for number in range(1, level + 1):
        chunk = Chunk(file, number, verify)
        for tensor in maskable.values():
            tensor.fill(chunk)
        if number == 1:
            shared |= {entry.name: _whole(entry, chunk) for entry in parameters if not entry.maskable}
        names = file.manifest.levels[number - 1].private
        private.append({name: chunk.tensor(private_name(number, name)).clone() for name in names})
    return NestedState(
        shared={entry.name: shared[entry.name] for entry in parameters},
        entry=EntryLevels(level, {name: tensor.entry for name, tensor in maskable.items()}),
        private=private,
        aliases={alias: entry.name for entry in parameters for alias in entry.aliases},
        units={entry.name: entry.unit for entry in parameters if entry.unit != (1, 1)},
    )


def _whole(parameter: ParameterEntry, chunk: Chunk) -> Tensor:
    """A shared tensor without entry levels; not stored where it has no elements."""
    if 0 in parameter.shape:
        return torch.empty(parameter.shape, dtype=TORCH_DTYPES[parameter.dtype])
    return chunk.tensor(values_name(1, parameter.name)).clone()
