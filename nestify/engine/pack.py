"""Packing a sparse layer into the bytes that the engine's operators read; see native/packed.h."""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestify.engine.library import Library, load_library
from nestify.errors import UnsupportedModelError
from nestify.exports.target import PackedType

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

LARGEST_HALF = 65504
"""Largest number that float16 holds."""

HIGHEST_DENSITY = 0.45
"""Largest share of non-zero weights at which a packed layer is faster than a dense one."""


@dataclass(frozen=True)
class SparseWeight:
    """A layer's weight without its zeros: one row per output.

    Attributes:
        shape: outputs and inputs per group, groups, kernel height and width; 1 and 1 for a linear layer.
        starts: int64 (rows + 1,): where each row begins in `columns` and `values`.
        columns: int32 (weights,): index in the flattened (inputs, kernel height, kernel width) of a row,
            ascending in each row.
        values: float32 (weights,).
    """

    shape: tuple[int, int, int, int, int]
    starts: NDArray[np.int64]
    columns: NDArray[np.int32]
    values: Floats

    @classmethod
    def from_dense(cls, weight: Floats, groups: int = 1) -> "SparseWeight":
        """Return the weights of a layer that are not 0.

        Args:
            weight: (outputs, inputs per group, kernel height, kernel width) or (outputs, inputs).
            groups: number of groups that the outputs are in.
        """
        rows = weight.reshape(len(weight), -1)
        kept = rows != 0
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(kept.sum(axis=1), out=starts[1:])
        height, width = weight.shape[2:] or (1, 1)
        shape = (len(rows) // groups, weight.shape[1], groups, height, width)
        return cls(
            shape, starts, np.nonzero(kept)[1].astype(np.int32), rows[kept].astype(np.float32, copy=False)
        )

    @property
    def density(self) -> float:
        """Share of the weights that are not zero, in [0, 1]."""
        outputs, inputs, groups, height, width = self.shape
        return len(self.values) / max(1, outputs * inputs * groups * height * width)


def pack(
    weight: SparseWeight,
    bias: Floats | None = None,
    block_rows: int = 0,
    dtype: PackedType = PackedType.float32,
) -> Bytes:
    """Pack a layer.

    Args:
        weight: the layer's weight.
        bias: float32 (outputs of all groups,); None for zeros.
        block_rows: columns of one block of the reduction, a multiple of the kernel's size; 0 to choose it by
            density.
        dtype: type in which the weights are stored; the bias is float32 always.

    Raises:
        UnsupportedModelError: if the packed format cannot hold the layer, such as weights above 65504 in
            float16.
        SetupError: if the library is missing.
    """
    library = load_library()
    shape = (ctypes.c_int64 * 5)(*weight.shape)
    starts, columns, values = (
        np.ascontiguousarray(weight.starts, np.int64),
        np.ascontiguousarray(weight.columns, np.int32),
        _as_stored(weight.values, dtype),
    )
    value_bits = ctypes.c_int32(8 * values.itemsize)
    assert len(starts) == weight.shape[0] * weight.shape[2] + 1
    assert len(columns) == len(values) == starts[-1]
    if bias is not None:
        bias = np.ascontiguousarray(bias, np.float32)
        assert bias.shape == (len(starts) - 1,)
    rows, size = ctypes.c_int64(block_rows), ctypes.c_int64()
    check(
        library.call(
            "nestify_packed_size",
            shape,
            pointer(starts),
            pointer(columns),
            value_bits,
            ctypes.byref(rows),
            ctypes.byref(size),
        )
    )
    packed = np.zeros(size.value, np.uint8)
    check(
        library.call(
            "nestify_pack",
            shape,
            pointer(starts),
            pointer(columns),
            pointer(values),
            value_bits,
            pointer(bias),
            rows,
            pointer(packed),
            size,
        )
    )
    return packed


def _as_stored(values: Floats, dtype: PackedType) -> NDArray[Any]:
    if dtype is PackedType.float32:
        return np.ascontiguousarray(values, np.float32)
    largest = float(np.abs(values).max(initial=0))
    if not largest <= LARGEST_HALF:
        raise UnsupportedModelError(
            f"a layer has the weight {largest:.6g}, and float16 ends at {LARGEST_HALF}; use --dtype float32"
        )
    return np.ascontiguousarray(values, np.float16)


def check_packed(packed: Bytes, library: Library | None = None) -> str | None:
    """Return what is wrong with a packed layer, or None."""
    library = library or load_library()
    return library.call("nestify_check_packed", pointer(packed), ctypes.c_int64(packed.nbytes))


def pointer(array: NDArray[Any] | None) -> ctypes.c_void_p:
    """Return the address of a contiguous array, for C; null for None."""
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def check(problem: str | None) -> None:
    """Raise an UnsupportedModelError if there is a problem with packing a layer."""
    if problem:
        raise UnsupportedModelError(f"a layer cannot be packed: {problem}; leave it dense")
