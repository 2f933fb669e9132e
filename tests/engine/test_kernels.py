"""Sparse layers against torch and NumPy in float64, in every geometry and on every instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestify.engine.library import VARIABLE, Library
from nestify.engine.pack import SparseWeight, pack
from tests.engine.oracle import (
    TOLERANCE,
    Convolution,
    convolution_error,
    linear_error,
    random_convolution,
    random_floats,
    run_conv,
)

ROOT = Path(__file__).parents[2]

CASES = {
    "pointwise": Convolution(1, 1, 64, 32, (14, 14)),
    "pointwise, several blocks and images": Convolution(3, 1, 200, 40, (7, 7)),
    "3x3": Convolution(2, 1, 33, 24, (15, 13), (3, 3), pads=(1, 1, 1, 1)),
    "3x3 stride 2": Convolution(1, 1, 48, 64, (28, 28), (3, 3), (2, 2), (1, 1, 1, 1)),
    "uneven padding, as of TensorFlow": Convolution(1, 1, 16, 16, (9, 12), (3, 3), (2, 2), (0, 0, 1, 1)),
    "patches": Convolution(1, 1, 3, 64, (32, 32), (8, 8), (8, 8)),
    "1x1 stride 2": Convolution(1, 1, 64, 32, (15, 14), (1, 1), (2, 2)),
    "dilated": Convolution(1, 1, 8, 8, (20, 21), (3, 3), pads=(4, 4, 4, 4), dilations=(4, 3)),
    "groups": Convolution(2, 4, 8, 12, (11, 9), (3, 3), pads=(1, 1, 1, 1)),
    "no weight at all": Convolution(1, 1, 8, 8, (5, 5), density=0),
    "one pixel": Convolution(1, 1, 40, 20, (3, 3), (3, 3)),
    "wide kernel of one row": Convolution(1, 1, 4, 8, (1, 90), (1, 31), pads=(0, 15, 0, 15)),
    "padding of more than the kernel": Convolution(1, 1, 4, 4, (4, 4), (2, 2), (3, 3), (5, 4, 3, 6)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("residual", [False, True])
def test_convolutions(library: Library, name: str, residual: bool) -> None:
    assert convolution_error(CASES[name], np.random.default_rng(0), residual) < TOLERANCE


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_any_convolution(library: Library, seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = random_convolution(rng)
    assert convolution_error(case, rng, residual=bool(seed % 2)) < TOLERANCE, case


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(197, 96, 144), (1, 100, 40), (5, 33, 24), (128, 7, 1)]
)
@pytest.mark.parametrize("residual", [False, True])
def test_linear_layers(library: Library, tokens: int, inputs: int, outputs: int, residual: bool) -> None:
    assert linear_error(tokens, inputs, outputs, np.random.default_rng(0), residual) < TOLERANCE


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set(library: Library, library_path: Path, isa: str) -> None:
    """Each in a process of its own, because the library chooses once."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.engine.oracle", "7", "25"],
        cwd=ROOT,
        env={**os.environ, "NESTIFY_ENGINE_ISA": isa, VARIABLE: str(library_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "is not an instruction set of this processor" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == isa


def test_not_a_number_passes_through(library: Library) -> None:
    """NaN in an image stays in the pixels that depend on it."""
    weight = np.ones((3, 2, 1, 1), np.float32)
    images = np.zeros((1, 2, 4, 5), np.float32)
    images[0, 1, 2, 3] = np.nan
    found = np.zeros((1, 3, 4, 5), np.float32)
    assert (
        run_conv(pack(SparseWeight.from_dense(weight)), images, found, Convolution(1, 1, 2, 3, (4, 5)), None)
        is None
    )
    assert np.isnan(found[0, :, 2, 3]).all()
    assert np.isnan(found).sum() == 3


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"strides": (0, 1)}, "stride"),
        ({"pads": (-1, 0, 0, 0)}, "padding"),
        ({"dilations": (1, 40_000)}, "dilation"),
        ({"dilations": (9, 9)}, "smaller than the kernel"),
        ({"pads": (1, 1, 1, 1)}, "size"),
    ],
)
def test_geometries_that_do_not_fit_are_refused(
    library: Library, change: dict[str, object], word: str
) -> None:
    packed = pack(SparseWeight.from_dense(np.ones((4, 4, 3, 3), np.float32)))
    case = Convolution(**{**vars(Convolution(1, 1, 4, 4, (8, 8), (3, 3))), **change})  # type: ignore[arg-type]
    images = random_floats(np.random.default_rng(0), 1, 4, 8, 8)
    problem = run_conv(packed, images, np.zeros((1, 4, 6, 6), np.float32), case, None)
    assert problem is not None
    assert word in problem
