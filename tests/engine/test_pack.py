"""The packed bytes, read again by a reader that follows the description in native/packed.h."""

import ctypes

import numpy as np
import pytest

from nestify.engine.library import Library
from nestify.engine.pack import Bytes, Floats, SparseWeight, check_packed, pack, pointer
from nestify.errors import UnsupportedModelError
from nestify.exports.target import PackedType
from tests.engine.oracle import run_linear

HEADER = np.dtype(
    [
        *(
            (name, "<u4")
            for name in ("magic", "format", "outputs", "inputs", "groups", "kernel_h", "kernel_w", "block")
        ),
        ("weights", "<u8"),
        ("reserved", "<u4", 6),
    ]
)


def unpack(packed: Bytes) -> tuple[Floats, Floats]:
    """Return the dense weight, (outputs, inputs * height * width), and the bias."""
    head = packed[:64].view(HEADER)[0]
    outputs, groups, block, weights = (int(head[name]) for name in ("outputs", "groups", "block", "weights"))
    reduction = int(head["inputs"]) * int(head["kernel_h"]) * int(head["kernel_w"])
    blocks = -(-reduction // block)
    rows, place = groups * blocks * outputs, 64
    values, bias = ("values", "<f4", weights), ("bias", "<f4", groups * outputs)
    if head["format"] == 2:
        values, bias = bias, ("values", "<f2", weights)
    layout = (("starts", "<i4", rows + 1), values, bias, ("columns", "<u2", weights), ("order", "<u2", rows))
    found = {}
    for name, dtype, count in layout:
        size = np.dtype(dtype).itemsize * count
        found[name] = packed[place : place + size].view(dtype)
        place += size
    assert place == len(packed)
    dense = np.zeros((groups * outputs, reduction), np.float32)
    for row in range(rows):
        group, number = divmod(row // outputs, blocks)
        for i in range(found["starts"][row], found["starts"][row + 1]):
            column = number * block + found["columns"][i]
            dense[group * outputs + found["order"][row], column] = found["values"][i]
    return dense, found["bias"]


@pytest.mark.parametrize(
    ("shape", "groups", "block_rows"),
    [((6, 5, 3, 3), 1, 0), ((6, 5, 3, 3), 2, 9), ((7, 300), 1, 0), ((4, 10), 1, 3), ((5, 2, 1, 7), 5, 0)],
)
def test_the_bytes_hold_the_weights(
    library: Library, shape: tuple[int, ...], groups: int, block_rows: int
) -> None:
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal(shape) * (rng.random(shape) < 0.3)).astype(np.float32)
    bias = rng.standard_normal(shape[0]).astype(np.float32)
    packed = pack(SparseWeight.from_dense(weight, groups), bias, block_rows)
    assert check_packed(packed) is None
    dense, found_bias = unpack(packed)
    np.testing.assert_array_equal(dense, weight.reshape(shape[0], -1))
    np.testing.assert_array_equal(found_bias, bias)
    assert (unpack(pack(SparseWeight.from_dense(weight, groups)))[1] == 0).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_float16_weights(library: Library, groups: int) -> None:
    """Weights are rounded as NumPy rounds them, and biases are not."""
    rng = np.random.default_rng(2)
    weight = (rng.standard_normal((6, 5, 3, 3)) * 10.0 ** rng.integers(-9, 4, (6, 5, 3, 3))).astype(
        np.float32
    )
    weight *= rng.random(weight.shape) < 0.4
    weight[0, 0, 0] = [65504, -65504, 2.0**-24]
    bias = rng.standard_normal(6).astype(np.float32)
    packed = pack(SparseWeight.from_dense(weight, groups), bias, dtype=PackedType.float16)
    assert check_packed(packed) is None
    dense, found_bias = unpack(packed)
    np.testing.assert_array_equal(dense, weight.reshape(6, -1).astype(np.float16))
    np.testing.assert_array_equal(found_bias, bias)
    kept = np.count_nonzero(weight)
    assert pack(SparseWeight.from_dense(weight, groups), bias).nbytes - packed.nbytes == 2 * kept


def test_every_float16_number_becomes_itself(library: Library) -> None:
    """Subnormal numbers too: one weight per output, times 1."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    count = len(halves)
    weight = SparseWeight(
        (count, 1, 1, 1, 1), np.arange(count + 1), np.zeros(count, np.int32), halves.astype(np.float32)
    )
    found = np.zeros((1, count), np.float32)
    packed = pack(weight, dtype=PackedType.float16)
    assert run_linear(packed, np.ones((1, 1), np.float32), found, None, -np.inf, np.inf) is None
    np.testing.assert_array_equal(found[0], halves.astype(np.float32))


@pytest.mark.parametrize("value", [65505, -7e4, np.inf, np.nan])
def test_weights_that_float16_cannot_hold(library: Library, value: float) -> None:
    weight = SparseWeight.from_dense(np.full((2, 3), value, np.float32))
    with pytest.raises(UnsupportedModelError, match=r"65504.*--dtype float32"):
        pack(weight, dtype=PackedType.float16)


def test_a_packed_layer_is_small(library: Library) -> None:
    """Six bytes per weight, and little for each row of each block."""
    rng = np.random.default_rng(1)
    weight = (rng.random((512, 512, 3, 3)) < 0.1).astype(np.float32)
    packed = pack(SparseWeight.from_dense(weight))
    assert 6 * weight.sum() < packed.nbytes < 6.7 * weight.sum()


def test_density_counts_zeros() -> None:
    weight = np.zeros((4, 5), np.float32)
    weight[1, 2:4] = 1
    assert SparseWeight.from_dense(weight).density == 0.1


@pytest.mark.parametrize("block_rows", [-1, 4, 70_000])
def test_blocks_of_whole_kernels(library: Library, block_rows: int) -> None:
    weight = SparseWeight.from_dense(np.ones((2, 3, 3, 3), np.float32))
    with pytest.raises(UnsupportedModelError, match="multiple of the kernel"):
        pack(weight, None, block_rows)


@pytest.mark.parametrize(
    ("starts", "columns", "word"),
    [
        ([0, 2, 1], [0, 1], "descend"),
        ([1, 1, 2], [0, 1], "start at 0"),
        ([0, 1, 2], [0, 5], "exceed"),
        ([0, 2, 2], [1, 1], "ascend"),
        ([0, 1, 2], [0, -1], "ascend"),
    ],
)
def test_rows_that_are_wrong_are_refused(
    library: Library, starts: list[int], columns: list[int], word: str
) -> None:
    size, block = ctypes.c_int64(), ctypes.c_int64()
    problem = library.call(
        "nestify_packed_size",
        (ctypes.c_int64 * 5)(2, 5, 1, 1, 1),
        pointer(np.array(starts, np.int64)),
        pointer(np.array(columns, np.int32)),
        ctypes.c_int32(32),
        ctypes.byref(block),
        ctypes.byref(size),
    )
    assert problem is not None
    assert word in problem
