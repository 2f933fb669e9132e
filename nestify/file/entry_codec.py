"""Coding of entry positions: which of the positions that no lower level uses enter at a level.

Positions are units: single weights, or blocks of output x input channels. With `remaining` units left
and `count` of them entering, the coding and its length in bytes follow from these two numbers alone:

- `none`, `all`: nothing is stored.
- `bits`: one bit per remaining unit, little bit order, zero bits up to a multiple of 8 bytes.
- `elias-fano`: where that is smaller. Each position is split at its `low` lowest bits,
  low = max(0, floor(log2(remaining / count))). The low parts are packed one after another, `low` bits
  each; the high parts are a bit vector of count + ((remaining - 1) >> low) + 1 bits, in which the i-th
  position (from 0) sets bit (high part + i). Both in little bit order, each padded with zero bits to a
  multiple of 8 bytes. P. Elias, "Efficient storage and retrieval by content and address of static
  files", J. ACM 21 (1974); R. Fano, "On the number of bits required to implement an associative memory",
  MIT Project MAC (1971).

NumPy only. Every function works on whole arrays; decoding needs little memory
beyond its result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import sub
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from nestify.file.layout import ALIGNMENT, Shape
from nestify.file.manifest import Coding

SEGMENT_BYTES = 2**14
"""Bytes whose bits are unpacked at a time."""

U8Array = NDArray[np.uint8]
BoolArray = NDArray[np.bool_]
Positions = NDArray[np.intp]
AnyType = TypeVar("AnyType", bound=np.generic)


def choose_coding(remaining: int, count: int) -> Coding:
    """Choose the coding of `count` entering units among `remaining`: the smaller one, `bits` on a tie."""
    if count == 0:
        return "none"
    if count == remaining:
        return "all"
    smaller = coded_bytes("elias-fano", remaining, count) < coded_bytes("bits", remaining, count)
    return "elias-fano" if smaller else "bits"


def remaining_units(available: int | Sequence[int], entering: Sequence[int]) -> list[int]:
    """Return the number of units that no lower level uses, at each level, core first.

    Args:
        available: number of units, the same for all levels or per level.
        entering: number of units that enter at each level.
    """
    units = [available] * len(entering) if isinstance(available, int) else available
    return list(map(sub, units, accumulate(entering, initial=0)))


def choose_codings(available: int | Sequence[int], entering: Sequence[int]) -> list[Coding]:
    """Choose the coding of each level, core first; for the arguments see `remaining_units`."""
    return list(map(choose_coding, remaining_units(available, entering), entering))


def coded_bytes(coding: Coding, remaining: int, count: int) -> int:
    """Return the length in bytes of the coded positions, a multiple of 8; 0 for `all` and `none`."""
    if coding == "bits":
        return _padded_bytes(remaining)
    if coding == "elias-fano":
        low = _low_bits(remaining, count)
        return _padded_bytes(count * low) + _padded_bytes(_high_bits(remaining, count, low))
    return 0


def encode(coding: Coding, enters: BoolArray) -> U8Array:
    """Encode which units enter.

    Args:
        coding: the coding from `choose_coding`.
        enters: (remaining,), one per remaining unit, in C order of the unit grid.

    Returns:
        The bytes to store, (`coded_bytes(...)`,).
    """
    if coding == "bits":
        return _pack(enters)
    if coding == "elias-fano":
        return _encode_elias_fano(enters)
    return np.empty(0, np.uint8)


class Entering(Protocol):
    """The remaining units that enter."""

    def between(self, begin: int, end: int) -> Positions:
        """Return the units of [begin, end) that enter, ascending, counted from `begin`."""


def decode(coding: Coding, data: U8Array, remaining: int, count: int) -> Entering:
    """Decode which units enter, the inverse of `encode`; only bytes that `encode` can produce are accepted.

    Args:
        data: the stored bytes, (`coded_bytes(coding, remaining, count)`,).

    Returns:
        The units that enter, exactly `count`; may share memory with `data`.

    Raises:
        ValueError: if the length of the bytes or the number of coded units is wrong, padding bits are set,
            or positions do not increase or are out of range.
    """
    if coding != choose_coding(remaining, count):
        raise ValueError(f"{count} of {remaining} entering units are not coded as {coding!r}")
    expected = coded_bytes(coding, remaining, count)
    if data.size != expected:
        raise ValueError(f"entry positions take {data.size} bytes where {expected} are expected")
    if coding == "elias-fano":
        return _Listed(_decode_elias_fano(data, remaining, count))
    if coding == "bits":
        _check_bits(data, remaining, count)
        return _Packed(data)
    return _Listed(np.arange(count))


@dataclass(frozen=True)
class _Packed:
    """One bit per remaining unit."""

    bits: U8Array

    def between(self, begin: int, end: int) -> Positions:
        return np.flatnonzero(_bits_between(self.bits, begin, end))


@dataclass(frozen=True)
class _Listed:
    """The entering units, ascending."""

    positions: NDArray[np.signedinteger[Any]]

    def between(self, begin: int, end: int) -> Positions:
        first, last = np.searchsorted(self.positions, (begin, end))
        return self.positions[first:last].astype(np.intp) - begin


def _encode_elias_fano(enters: BoolArray) -> U8Array:
    positions = np.flatnonzero(enters)
    count, remaining = positions.size, enters.size
    low = _low_bits(remaining, count)
    low_parts = np.empty((count, low), np.bool_)
    for bit in range(low):
        low_parts[:, bit] = (positions >> bit) & 1
    high_parts = np.zeros(_high_bits(remaining, count, low), np.bool_)
    high_parts[(positions >> low) + np.arange(count)] = True
    return np.concatenate([_pack(low_parts.reshape(-1)), _pack(high_parts)])


def _decode_elias_fano(data: U8Array, remaining: int, count: int) -> NDArray[np.signedinteger[Any]]:
    low = _low_bits(remaining, count)
    low_parts, high_parts = np.split(data, [_padded_bytes(count * low)])
    _check_bits(low_parts, count * low)
    _check_bits(high_parts, _high_bits(remaining, count, low), count)
    found: NDArray[np.signedinteger[Any]] = np.empty(count, np.int32 if remaining < 2**31 else np.int64)
    seen = 0
    for begin in range(0, high_parts.size, SEGMENT_BYTES):
        ones = np.flatnonzero(_unpack(high_parts[begin : begin + SEGMENT_BYTES])) + 8 * begin
        end = seen + ones.size
        positions = (ones - np.arange(seen, end)) << low
        lows = _bits_between(low_parts, seen * low, end * low).reshape(-1, low)
        for bit in range(low):
            positions |= lows[:, bit].astype(np.int64) << bit
        if positions.size and positions.max() >= remaining:
            raise ValueError(f"entry position {positions.max()} is not below {remaining}")
        found[seen:end] = positions
        seen = end
    if np.any(found[1:] <= found[:-1]):
        raise ValueError("entry positions do not increase")
    return found


def _low_bits(remaining: int, count: int) -> int:
    return (remaining // count).bit_length() - 1


def _high_bits(remaining: int, count: int, low: int) -> int:
    return count + ((remaining - 1) >> low) + 1


def _padded_bytes(bits: int) -> int:
    return -(-bits // (8 * ALIGNMENT)) * ALIGNMENT


def _pack(bits: BoolArray) -> U8Array:
    packed = np.zeros(_padded_bytes(bits.size), np.uint8)
    packed[: -(-bits.size // 8)] = np.packbits(bits, bitorder="little")
    return packed


def _unpack(packed: U8Array) -> BoolArray:
    """Return all bits of packed bytes, (8 * bytes,)."""
    unpacked: BoolArray = np.unpackbits(packed, bitorder="little").view(np.bool_)
    return unpacked


def _bits_between(packed: U8Array, begin: int, end: int) -> BoolArray:
    """Return bits [begin, end) of packed bits, (end - begin,)."""
    unpacked = _unpack(packed[begin // 8 : -(-end // 8)])
    return unpacked[begin % 8 : begin % 8 + end - begin]


def _check_bits(packed: U8Array, bits: int, ones: int | None = None) -> None:
    """Refuse set padding bits, and any number of set bits other than `ones`."""
    if _bits_between(packed, bits, 8 * packed.size).any():
        raise ValueError("padding bits of entry positions are set")
    segments = (packed[begin : begin + SEGMENT_BYTES] for begin in range(0, packed.size, SEGMENT_BYTES))
    found = sum(int(np.count_nonzero(_unpack(segment))) for segment in segments)
    if ones is not None and found != ones:
        raise ValueError(f"entry positions name {found} units where {ones} enter")


# Units: (rows, cols) is a block of output x input channels at one kernel position; edges are ragged.


def unit_grid(shape: Shape, unit: tuple[int, int]) -> Shape:
    """Return the shape of the unit grid: (ceil(out / rows), ceil(in / cols), *kernel), or `shape`."""
    if len(shape) < 2:
        return shape
    return (-(-shape[0] // unit[0]), -(-shape[1] // unit[1]), *shape[2:])


def reduce_to_units(entry: U8Array, unit: tuple[int, int]) -> U8Array:
    """Reduce the entry levels of weights to those of units.

    Args:
        entry: (out, in, *kernel), entry level of each weight.

    Returns:
        (prod(unit_grid),), in C order of the unit grid; a view of `entry` if units are single weights.

    Raises:
        ValueError: if entry levels differ inside a block.
    """
    if entry.ndim < 2 or unit == (1, 1):
        return entry.reshape(-1)
    units = np.ascontiguousarray(entry[:: unit[0], :: unit[1]]).reshape(-1)
    if not np.array_equal(expand_units(units, entry.shape, unit), entry):
        raise ValueError(f"entry levels differ inside a block of {unit[0]}x{unit[1]}")
    return units


def expand_units(units: NDArray[AnyType], shape: Shape, unit: tuple[int, int]) -> NDArray[AnyType]:
    """Expand the values of units (prod(unit_grid),) to `shape`, the inverse of `reduce_to_units`."""
    grid = units.reshape(unit_grid(shape, unit))
    if len(shape) < 2 or not grid.size:
        return grid.reshape(shape)
    for axis in (0, 1):
        if unit[axis] == 1:
            continue
        grid = grid.take(np.arange(shape[axis]) // unit[axis], axis=axis)
    return grid
