"""The packed bytes, read again by a reader that follows the description in native/packed.h."""

import ctypes

import numpy as np
import pytest

from nestify.engine.library import Library
from nestify.engine.pack import Bytes, Floats, SparseWeight, check_packed, pack, pointer
from nestify.errors import UnsupportedModelError

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
    rows, place, arrays = groups * blocks * outputs, 64, []
    for dtype, count in (
        ("<i4", rows + 1),
        ("<f4", weights),
        ("<f4", groups * outputs),
        ("<u2", weights),
        ("<u2", rows),
    ):
        size = np.dtype(dtype).itemsize * count
        arrays.append(packed[place : place + size].view(dtype))
        place += size
    assert place == len(packed)
    starts, values, bias, columns, order = arrays
    dense = np.zeros((groups * outputs, reduction), np.float32)
    for row in range(rows):
        group, number = divmod(row // outputs, blocks)
        for i in range(starts[row], starts[row + 1]):
            dense[group * outputs + order[row], number * block + columns[i]] = values[i]
    return dense, bias


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
        ctypes.byref(block),
        ctypes.byref(size),
    )
    assert problem is not None
    assert word in problem
