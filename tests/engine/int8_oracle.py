"""Packed int8 layers on the C functions of the library, and what NumPy computes in int64."""

import ctypes
import sys
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestify.engine.library import load_library
from nestify.engine.pack import Bytes, pointer
from nestify.engine.pack_int8 import DepthwiseWeight, QuadWeight, pack_int8
from tests.engine.oracle import Convolution, random_convolution

Uint8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Units:
    """Zero points, limits, and the scale of the residual over that of the output."""

    input_zero: int = 0
    output_zero: int = 0
    low: int = 0
    high: int = 255
    residual_zero: int = 0
    residual_scale: float = 1.0


def random_units(rng: np.random.Generator) -> Units:
    low, high = sorted(rng.integers(0, 256, 2).tolist()) if rng.random() < 0.3 else (0, 255)
    given, output, added = (int(rng.choice([0, 7, 128, 255])) for _ in range(3))
    return Units(given, output, low, high, added, float(np.float32(rng.choice([0, 0.3, 1, 2.5]))))


def random_quads(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> NDArray[np.int8]:
    """A weight (outputs, inputs, height, width) whose quads of inputs are zero at random."""
    outputs, inputs, height, width = shape
    kept = rng.random((outputs, -(-inputs // 4), height, width)) < density
    values = rng.integers(-128, 128, shape)
    return np.asarray(values * kept.repeat(4, axis=1)[:, :inputs], np.int8)


def random_case(rng: np.random.Generator, case: Convolution, with_residual: bool) -> tuple[Uint8, Uint8]:
    """Run a random layer; returns the engine's result and NumPy's."""
    shape = (case.groups * case.outputs, case.inputs, *case.kernel)
    weight = random_quads(rng, shape, case.density)
    bias = rng.integers(-20_000, 20_000, shape[0], np.int32)
    multipliers = rng.uniform(0, 0.004, shape[0]).astype(np.float32)
    images = rng.integers(0, 256, (case.batch, case.groups * case.inputs, *case.image), np.uint8)
    units = random_units(rng)
    sums = integer_sums(images, weight, case, units.input_zero) + bias[:, None, None]
    residual = rng.integers(0, 256, sums.shape, np.uint8) if with_residual else None
    expected = requantise(sums, multipliers, units, residual)
    blocks = case.blocks * case.kernel[0] * case.kernel[1]
    packed = pack_int8(QuadWeight.from_dense(weight, case.groups), bias, multipliers, blocks)
    found = np.full(sums.shape, 99, np.uint8)
    assert run_conv_int8(packed, images, found, case, units, residual) is None
    return found, expected


def random_depthwise(rng: np.random.Generator) -> Convolution:
    """Any geometry of a depthwise layer; half are those that have kernels of their own."""
    case = replace(random_convolution(rng), groups=int(rng.integers(2, 9)), inputs=1, outputs=1)
    if rng.random() < 0.5:
        side, stride = int(rng.choice([3, 5, 7])), int(rng.integers(1, 3))
        image = tuple(rng.integers(side, side + 90, 2).tolist())
        case = replace(case, kernel=(side, side), strides=(stride, stride), dilations=(1, 1), image=image)
    return case


def random_depthwise_case(
    rng: np.random.Generator, case: Convolution, with_residual: bool
) -> tuple[Uint8, Uint8]:
    """Run a random depthwise layer; returns the engine's result and NumPy's."""
    channels = case.groups
    weight = rng.integers(-128, 128, (channels, 1, *case.kernel)).astype(np.int8)
    bias = rng.integers(-20_000, 20_000, channels, np.int32)
    multipliers = rng.uniform(0, 0.02, channels).astype(np.float32)
    images = rng.integers(0, 256, (case.batch, channels, *case.image), np.uint8)
    units = random_units(rng)
    sums = integer_sums(images, weight, case, units.input_zero) + bias[:, None, None]
    residual = rng.integers(0, 256, sums.shape, np.uint8) if with_residual else None
    found = np.full(sums.shape, 99, np.uint8)
    packed = DepthwiseWeight(weight[:, 0]).pack(bias, multipliers)
    assert run_conv_int8(packed, images, found, case, units, residual) is None
    return found, requantise(sums, multipliers, units, residual)


def random_linear(
    rng: np.random.Generator, tokens: int, inputs: int, outputs: int, block: int = 0
) -> tuple[Uint8, Uint8]:
    """Run a random linear layer; returns the engine's result and NumPy's, (tokens, outputs)."""
    weight = random_quads(rng, (outputs, inputs, 1, 1), rng.uniform(0.05, 0.6))
    bias = rng.integers(-20_000, 20_000, outputs, np.int32)
    multipliers = rng.uniform(0, 0.004, outputs).astype(np.float32)
    features, units = rng.integers(0, 256, (tokens, inputs), np.uint8), random_units(rng)
    case = Convolution(1, 1, inputs, outputs, (tokens, 1))
    # The same sums as those of a 1x1 convolution over an image of one column.
    sums = integer_sums(features.T[None, :, :, None].copy(), weight, case, units.input_zero)
    expected = requantise(sums + bias[:, None, None], multipliers, units, None)
    packed = pack_int8(QuadWeight.from_dense(weight), bias, multipliers, block)
    found = np.full((tokens, outputs), 99, np.uint8)
    assert run_linear_int8(packed, features, found, units) is None
    return found, expected[0, :, :, 0].T


def run_linear_int8(packed: Bytes, features: Uint8, found: Uint8, units: Units) -> str | None:
    """Run a packed linear layer into `found`; returns the library's message."""
    return load_library().call(
        "nestify_linear_int8",
        pointer(packed),
        ctypes.c_int64(packed.nbytes),
        pointer(features),
        ctypes.c_int64(len(features)),
        (ctypes.c_int32 * 4)(units.input_zero, units.output_zero, units.low, units.high),
        pointer(found),
    )


def integer_sums(images: Uint8, weight: NDArray[np.int8], case: Convolution, zero: int) -> NDArray[np.int64]:
    """The exact sums of products, where padding has the zero point's value."""
    top, left, bottom, right = case.pads
    padded = np.pad(
        images.astype(np.int64), ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=zero
    )
    (down, across), (height, width) = case.strides, padded.shape[2:]
    spans = [d * (k - 1) + 1 for d, k in zip(case.dilations, case.kernel, strict=True)]
    rows, columns = (height - spans[0]) // down + 1, (width - spans[1]) // across + 1
    sums = np.zeros((case.batch, case.groups, case.outputs, rows, columns), np.int64)
    grouped = padded.reshape(case.batch, case.groups, case.inputs, height, width)
    weights = weight.astype(np.int64).reshape(case.groups, case.outputs, case.inputs, *case.kernel)
    for i, j in product(*map(range, case.kernel)):
        y, x = i * case.dilations[0], j * case.dilations[1]
        window = grouped[..., y : y + down * rows : down, x : x + across * columns : across]
        sums += np.einsum("goc,ngcyx->ngoyx", weights[..., i, j], window[..., :rows, :columns])
    return sums.reshape(case.batch, -1, rows, columns)


def requantise(
    sums: NDArray[np.int64], multipliers: NDArray[np.float32], units: Units, residual: Uint8 | None
) -> Uint8:
    """Scale sums in float32 with one rounding, add the residual, round half to even, and clamp."""
    factors = multipliers[:, None, None]
    if residual is None:
        scaled: NDArray[Any] = sums.astype(np.float32) * factors
    else:
        added = (residual.astype(np.float32) - units.residual_zero) * np.float32(units.residual_scale)
        # Products of two float32 are exact in float64, so that this rounds once, as a multiply-add does.
        scaled = (sums.astype(np.float32).astype(np.float64) * factors + added).astype(np.float32)
    return np.clip(np.rint(scaled) + units.output_zero, units.low, units.high).astype(np.uint8)


def run_conv_int8(
    packed: Bytes, images: Uint8, found: Uint8, case: Convolution, units: Units, residual: Uint8 | None
) -> str | None:
    """Run a packed convolution into `found`; returns the library's message."""
    limits = (units.input_zero, units.output_zero, units.low, units.high, units.residual_zero)
    return load_library().call(
        "nestify_conv_int8",
        pointer(packed),
        ctypes.c_int64(packed.nbytes),
        pointer(images),
        *(ctypes.c_int64(images.shape[dim]) for dim in (0, 2, 3)),
        (ctypes.c_int64 * 8)(*case.strides, *case.pads, *case.dilations),
        (ctypes.c_int32 * 5)(*limits),
        pointer(residual),
        ctypes.c_float(units.residual_scale),
        pointer(found),
        ctypes.c_int64(found.size),
    )


def check(seed: int, count: int) -> None:
    """Compare many random layers; prints the instruction set."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        case = random_convolution(rng)
        found, expected = random_case(rng, case, with_residual=bool(index % 2))
        assert np.array_equal(found, expected), case
        case = random_depthwise(rng)
        found, expected = random_depthwise_case(rng, case, with_residual=bool(index % 2))
        assert np.array_equal(found, expected), case
        sizes = (int(rng.integers(1, 130)), int(rng.integers(1, 300)), int(rng.integers(1, 150)))
        found, expected = random_linear(rng, *sizes, block=int(rng.choice([0, 1, 7, 64])))
        assert np.array_equal(found, expected), sizes
    print(load_library().isa)


if __name__ == "__main__":
    check(int(sys.argv[1]), int(sys.argv[2]))
