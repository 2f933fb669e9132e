"""Packing int8 layers: sparse ones, whose weights are in groups of four inputs, and depthwise ones."""

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nestify.engine.library import load_library
from nestify.engine.pack import Bytes, Floats, check, pointer

QUAD = 4
"""Input channels that share one index; see native/kernel_int8.inc."""


@dataclass(frozen=True)
class QuadWeight:
    """A layer's int8 weight without its quads of zeros: one row per output.

    Attributes:
        shape: outputs and inputs per group, groups, kernel height and width.
        starts: int64 (rows + 1,): where each row begins in `columns` and `quads`.
        columns: int32 (quads,): index in the flattened (quads of inputs, kernel height, kernel width) of a
            row, ascending in each row.
        quads: int8 (quads, 4).
    """

    shape: tuple[int, int, int, int, int]
    starts: NDArray[np.int64]
    columns: NDArray[np.int32]
    quads: NDArray[np.int8]

    @classmethod
    def from_dense(cls, weight: NDArray[np.int8], groups: int = 1) -> "QuadWeight":
        """Return the quads of a layer that are not 0.

        Args:
            weight: (outputs, inputs per group, kernel height, kernel width).
            groups: number of groups that the outputs are in.
        """
        outputs, inputs, height, width = weight.shape
        padded = np.pad(weight, ((0, 0), (0, -inputs % QUAD), (0, 0), (0, 0)))
        quads = padded.reshape(outputs, -1, QUAD, height, width).transpose(0, 1, 3, 4, 2)
        quads = quads.reshape(outputs, -1, QUAD)
        kept = quads.any(axis=2)
        starts = np.zeros(outputs + 1, np.int64)
        np.cumsum(kept.sum(axis=1), out=starts[1:])
        shape = (outputs // groups, inputs, groups, height, width)
        return cls(shape, starts, np.nonzero(kept)[1].astype(np.int32), quads[kept])

    @property
    def density(self) -> float:
        """Share of the quads that are not zero, in [0, 1]."""
        outputs, inputs, groups, height, width = self.shape
        return len(self.quads) / max(1, outputs * -(-inputs // QUAD) * groups * height * width)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of quads of each output: int64 (outputs of all groups,)."""
        return np.diff(self.starts)

    @property
    def totals(self) -> NDArray[np.int64]:
        """Sum of the weights of each output: int64 (outputs of all groups,)."""
        totals = np.zeros(len(self.starts) - 1, np.int64)
        rows = np.repeat(np.arange(len(totals)), self.counts)
        np.add.at(totals, rows, self.quads.sum(axis=1, dtype=np.int64))
        return totals

    def pack(self, bias: NDArray[np.int32] | None, multipliers: Floats) -> Bytes:
        """Pack the layer; see `pack_int8`."""
        return pack_int8(self, bias, multipliers)


@dataclass(frozen=True)
class DepthwiseWeight:
    """The int8 weight of a depthwise layer, with one output for each channel.

    Attributes:
        weight: int8 (channels, kernel height, kernel width).
    """

    weight: NDArray[np.int8]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Outputs and inputs per group, groups, kernel height and width."""
        channels, height, width = self.weight.shape
        return 1, 1, channels, height, width

    @property
    def density(self) -> float:
        """Share of the weights that are not zero, in [0, 1]."""
        return float(np.count_nonzero(self.weight)) / max(1, self.weight.size)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of weights of each channel that are not zero: int64 (channels,)."""
        return np.asarray(np.count_nonzero(self.weight, axis=(1, 2)), np.int64)

    @property
    def totals(self) -> NDArray[np.int64]:
        """Sum of the weights of each channel: int64 (channels,)."""
        return np.asarray(self.weight.sum(axis=(1, 2), dtype=np.int64))

    def pack(self, bias: NDArray[np.int32] | None, multipliers: Floats) -> Bytes:
        """Pack the layer, with all of its weights; the arguments and errors are those of `pack_int8`."""
        library = load_library()
        shape, size = (ctypes.c_int64 * 5)(*self.shape), ctypes.c_int64()
        weight = np.ascontiguousarray(self.weight, np.int8)
        multipliers = np.ascontiguousarray(multipliers, np.float32)
        assert multipliers.shape == (len(weight),)
        if bias is not None:
            bias = np.ascontiguousarray(bias, np.int32)
            assert bias.shape == multipliers.shape
        check(library.call("nestify_packed_depthwise_size", shape, ctypes.byref(size)))
        packed = np.zeros(size.value, np.uint8)
        values = map(pointer, (weight, bias, multipliers))
        check(library.call("nestify_pack_depthwise", shape, *values, pointer(packed), size))
        return packed


def pack_int8(
    weight: QuadWeight, bias: NDArray[np.int32] | None, multipliers: Floats, block_rows: int = 0
) -> Bytes:
    """Pack an int8 layer.

    Args:
        weight: the layer's weight.
        bias: int32 (outputs of all groups,), in units of the sums; None for zeros.
        multipliers: float32 (outputs of all groups,): a sum times it is in units of the output.
        block_rows: quads of one block of the reduction, a multiple of the kernel's size; 0 to choose it by
            density.

    Raises:
        UnsupportedModelError: if the packed format cannot hold the layer.
        SetupError: if the library is missing.
    """
    library = load_library()
    shape = (ctypes.c_int64 * 5)(*weight.shape)
    starts, columns, quads, multipliers = (
        np.ascontiguousarray(weight.starts, np.int64),
        np.ascontiguousarray(weight.columns, np.int32),
        np.ascontiguousarray(weight.quads, np.int8),
        np.ascontiguousarray(multipliers, np.float32),
    )
    assert len(starts) == weight.shape[0] * weight.shape[2] + 1 == len(multipliers) + 1
    assert len(columns) == len(quads) == starts[-1]
    if bias is not None:
        bias = np.ascontiguousarray(bias, np.int32)
        assert bias.shape == multipliers.shape
    rows, size = ctypes.c_int64(block_rows), ctypes.c_int64()
    arrays = (pointer(starts), pointer(columns))
    check(library.call("nestify_packed_int8_size", shape, *arrays, ctypes.byref(rows), ctypes.byref(size)))
    packed = np.zeros(size.value, np.uint8)
    values = map(pointer, (quads, bias, multipliers))
    check(library.call("nestify_pack_int8", shape, *arrays, *values, rows, pointer(packed), size))
    return packed
