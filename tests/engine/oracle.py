"""Packed layers on the C functions of the library, and what torch computes in float64."""

import ctypes
import sys
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import conv2d, pad

from nestify.engine.library import load_library
from nestify.engine.pack import Bytes, Floats, SparseWeight, pack, pointer

Array = NDArray[Any]


@dataclass(frozen=True)
class Convolution:
    """A convolution and its input; sizes are (height, width), pads (top, left, bottom, right)."""

    batch: int
    groups: int
    inputs: int
    outputs: int
    image: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    density: float = 0.3
    low: float = -inf
    high: float = inf
    blocks: int = 0
    """Channels of one block of the reduction; 0 lets the packer choose."""


def random_floats(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


def random_convolution(rng: np.random.Generator) -> Convolution:
    """Any geometry; two in five are pointwise."""
    pointwise = bool(rng.random() < 0.4)
    kernel = (1, 1) if pointwise else tuple(rng.integers(1, 6, 2).tolist())
    dilations = (1, 1) if pointwise else tuple(rng.integers(1, 4, 2).tolist())
    least = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    return Convolution(
        batch=int(rng.integers(1, 4)),
        groups=int(rng.choice([1, 1, 1, 2, 3])),
        inputs=int(rng.integers(1, 60)),
        outputs=int(rng.integers(1, 60)),
        image=(int(rng.integers(least[0], least[0] + 30)), int(rng.integers(least[1], least[1] + 30))),
        kernel=kernel,
        strides=(1, 1) if pointwise else tuple(rng.integers(1, 5, 2).tolist()),
        pads=(0, 0, 0, 0) if pointwise else tuple(rng.integers(0, 4, 4).tolist()),
        dilations=dilations,
        density=float(rng.choice([0, 0.02, 0.1, 0.3, 1])),
        low=float(rng.choice([-inf, 0, -1])),
        high=float(rng.choice([inf, 6, 1])),
        blocks=int(rng.choice([0, 1, 7])),
    )


def convolution_error(case: Convolution, rng: np.random.Generator, residual: bool) -> float:
    """The largest difference from torch's result, relative to the largest sum before the clamp."""
    shape = (case.groups * case.outputs, case.inputs, *case.kernel)
    weight = random_floats(rng, *shape) * (rng.random(shape) < case.density)
    bias = random_floats(rng, shape[0])
    images = random_floats(rng, case.batch, case.groups * case.inputs, *case.image)
    top, left, bottom, right = case.pads
    sums = conv2d(
        pad(torch.from_numpy(images).double(), (left, right, top, bottom)),
        torch.from_numpy(weight).double(),
        torch.from_numpy(bias).double(),
        stride=case.strides,
        dilation=case.dilations,
        groups=case.groups,
    ).numpy()
    added = random_floats(rng, *sums.shape) if residual else None
    sums = sums if added is None else sums + added
    packed = pack(
        SparseWeight.from_dense(weight, case.groups), bias, case.blocks * case.kernel[0] * case.kernel[1]
    )
    found = np.full(sums.shape, np.nan, np.float32)
    assert run_conv(packed, images, found, case, added) is None
    return float(np.abs(found - sums.clip(case.low, case.high)).max() / np.abs(sums).max())


def run_conv(
    packed: Bytes, images: Floats, found: Floats, case: Convolution, residual: Floats | None
) -> str | None:
    """Run a packed convolution into `found`; returns the library's message."""
    geometry = (*case.strides, *case.pads, *case.dilations)
    return load_library().call(
        "nestify_conv",
        pointer(packed),
        ctypes.c_int64(packed.nbytes),
        pointer(images),
        *(ctypes.c_int64(images.shape[dim]) for dim in (0, 2, 3)),
        (ctypes.c_int64 * 8)(*geometry),
        pointer(residual),
        ctypes.c_float(case.low),
        ctypes.c_float(case.high),
        pointer(found),
        ctypes.c_int64(found.size),
    )


def run_linear(
    packed: Bytes, tokens: Floats, found: Floats, residual: Floats | None, low: float, high: float
) -> str | None:
    """Run a packed linear layer into `found`; returns the library's message."""
    return load_library().call(
        "nestify_linear",
        pointer(packed),
        ctypes.c_int64(packed.nbytes),
        pointer(tokens),
        ctypes.c_int64(len(tokens)),
        pointer(residual),
        ctypes.c_float(low),
        ctypes.c_float(high),
        pointer(found),
    )


def linear_error(tokens: int, inputs: int, outputs: int, rng: np.random.Generator, residual: bool) -> float:
    """The largest difference from NumPy's result, relative to the largest sum."""
    weight = random_floats(rng, outputs, inputs) * (rng.random((outputs, inputs)) < 0.3)
    bias, given = random_floats(rng, outputs), random_floats(rng, tokens, inputs)
    added = random_floats(rng, tokens, outputs) if residual else None
    sums = given.astype(np.float64) @ weight.T.astype(np.float64) + bias + (0 if added is None else added)
    found = np.full(sums.shape, np.nan, np.float32)
    packed = pack(SparseWeight.from_dense(weight), bias, int(rng.choice([0, 5, 64])))
    assert run_linear(packed, given, found, added, -1, 1) is None
    return float(np.abs(found - sums.clip(-1, 1)).max() / np.abs(sums).max())


TOLERANCE = 5e-6


def check(seed: int, count: int) -> None:
    """Compare many random layers; prints the instruction set and the largest difference."""
    rng, worst = np.random.default_rng(seed), 0.0
    for index in range(count):
        case = random_convolution(rng)
        error = convolution_error(case, rng, residual=bool(index % 2))
        assert error < TOLERANCE, (error, case)
        sizes = rng.integers(1, 220, 3).tolist()
        linear = linear_error(*sizes, rng, residual=bool(index % 2))
        assert linear < TOLERANCE, (linear, sizes)
        worst = max(worst, error, linear)
    print(load_library().isa, worst)


if __name__ == "__main__":
    check(int(sys.argv[1]), int(sys.argv[2]))
