"""Sparse int8 convolutions against NumPy's integers: every byte is equal, on every instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestify.engine.library import VARIABLE, Library
from nestify.engine.pack import Bytes, SparseWeight, check_packed, pack
from nestify.engine.pack_int8 import QuadWeight, pack_int8
from tests.engine.int8_oracle import (
    Units,
    random_case,
    random_linear,
    random_quads,
    run_conv_int8,
    run_linear_int8,
)
from tests.engine.oracle import Convolution, random_convolution, run_conv
from tests.engine.test_kernels import CASES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("residual", [False, True])
def test_convolutions(library: Library, name: str, residual: bool) -> None:
    found, expected = random_case(np.random.default_rng(0), CASES[name], residual)
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_any_convolution(library: Library, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, expected = random_case(rng, random_convolution(rng), bool(seed % 2))
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 130),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 150),
    block=st.sampled_from([0, 1, 7, 64]),
)
def test_any_linear_layer(
    library: Library, seed: int, tokens: int, inputs: int, outputs: int, block: int
) -> None:
    found, expected = random_linear(np.random.default_rng(seed), tokens, inputs, outputs, block)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set(library: Library, library_path: Path, isa: str) -> None:
    """Each in a process of its own, because the library chooses once."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.engine.int8_oracle", "7", "40"],
        cwd=ROOT,
        env={**os.environ, "NESTIFY_ENGINE_ISA": isa, VARIABLE: str(library_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "is not an instruction set of this processor" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]


def test_a_weight_becomes_quads_of_inputs() -> None:
    weight = np.zeros((2, 6, 1, 2), np.int8)
    weight[0, 5, 0, 1] = -3  # the second quad, the second tap
    weight[1, :4, 0, 0] = [1, 2, 3, 4]
    found = QuadWeight.from_dense(weight)
    assert found.shape == (2, 6, 1, 1, 2)
    assert found.starts.tolist() == [0, 1, 2]
    assert found.columns.tolist() == [3, 0]
    assert found.quads.tolist() == [[0, -3, 0, 0], [1, 2, 3, 4]]
    assert found.density == 2 / 8


def test_largest_sums_do_not_overflow_the_output(library: Library) -> None:
    """Sums of 4096 extreme products, scaled by the largest multiplier."""
    weight = np.full((2, 4096, 1, 1), -128, np.int8)
    weight[1] = 127
    packed = pack_int8(QuadWeight.from_dense(weight), None, np.full(2, 0.5, np.float32))
    images = np.full((1, 4096, 1, 3), 255, np.uint8)
    found = np.full((1, 2, 1, 3), 99, np.uint8)
    case = Convolution(1, 1, 4096, 2, (1, 3))
    assert run_conv_int8(packed, images, found, case, Units(output_zero=200), None) is None
    assert found.tolist() == [[[[0, 0, 0]], [[255, 255, 255]]]]


def small_layer() -> Bytes:
    """Two groups of 3 outputs and 6 inputs, kernels of 3x2, blocks of one quad."""
    rng = np.random.default_rng(0)
    weight = QuadWeight.from_dense(random_quads(rng, (6, 6, 3, 2), 0.5), 2)
    return pack_int8(weight, rng.integers(-99, 99, 6, np.int32), np.full(6, 0.01, np.float32), 6)


@pytest.mark.parametrize(
    ("place", "dtype", "value", "word"),
    [
        (4, "<u4", 1, "channels"),
        (40, "<u4", 4, "channels"),
        (40, "<u4", 9, "channels"),
        (40, "<u4", 2**32 - 1, "channels"),
        ("multipliers", "<f4", np.nan, "multiplier"),
        ("multipliers", "<f4", -0.01, "multiplier"),
        ("multipliers", "<f4", 0.6, "multiplier"),
        ("columns", "<u2", 6, "column"),
        ("order", "<u2", 3, "output"),
    ],
)
def test_damage_is_named(library: Library, place: int | str, dtype: str, value: float, word: str) -> None:
    packed = small_layer()
    quads = int(packed[32:40].view("<u8")[0])
    multipliers = 64 + 4 * (2 * 2 * 3 + 1) + 4 * quads + 4 * 6
    columns = multipliers + 4 * 6
    places = {"multipliers": multipliers, "columns": columns, "order": columns + 2 * quads}
    assert places["order"] + 2 * (2 * 2 * 3) == len(packed)
    offset = places[place] if isinstance(place, str) else place
    packed[offset : offset + np.dtype(dtype).itemsize].view(dtype)[0] = value
    problem = check_packed(packed)
    assert problem is not None
    assert word in problem


def linear_layer() -> Bytes:
    """3 outputs and 12 inputs, blocks of two quads."""
    rng = np.random.default_rng(0)
    weight = QuadWeight.from_dense(random_quads(rng, (3, 12, 1, 1), 0.5))
    return pack_int8(weight, rng.integers(-99, 99, 3, np.int32), np.full(3, 0.01, np.float32), 2)


def fuzz(seed: int, count: int) -> int:
    """Damage layers at random; run those that are accepted. Returns how many were."""
    rng, sounds = np.random.default_rng(seed), (small_layer(), linear_layer())
    images = rng.integers(0, 256, (1, 12, 7, 6), np.uint8)
    case, accepted = Convolution(1, 2, 6, 3, (7, 6), (3, 2), (2, 1), (1, 0, 1, 1)), 0
    for number in range(count):
        packed = sounds[number % 2].copy()
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(64 if rng.random() < 0.5 else len(packed)))
            packed[place] = rng.integers(256) if rng.random() < 0.5 else packed[place] ^ 1 << rng.integers(8)
        if check_packed(packed) is None:
            found = np.zeros((1, 6, 4, 6), np.uint8)
            channels = int(packed[40:44].view("<u4")[0]) * int(packed[16:20].view("<u4")[0])
            if channels <= 12:  # the C functions take the number of channels from the layer
                run_conv_int8(packed, images, found, case, Units(3, 5), None)
                if int(packed[8:12].view("<u4")[0]) <= 3:  # and that of the outputs
                    run_linear_int8(packed, images.reshape(-1, 12), np.zeros((42, 3), np.uint8), Units(3, 5))
            accepted += 1
    return accepted


def test_damaged_layers_are_refused_or_harmless(library: Library) -> None:
    assert 0 < fuzz(0, 3000) < 2500


@pytest.mark.parametrize(
    ("units", "word"),
    [
        (Units(input_zero=256), "zero point"),
        (Units(output_zero=-1), "zero point"),
        (Units(low=9, high=8), "limit"),
        (Units(residual_scale=float("nan")), "scale"),
        (Units(residual_scale=1e7), "scale"),
    ],
)
def test_units_are_checked(library: Library, units: Units, word: str) -> None:
    images, found = np.zeros((1, 12, 7, 6), np.uint8), np.zeros((1, 6, 5, 5), np.uint8)
    problem = run_conv_int8(
        small_layer(), images, found, Convolution(1, 2, 6, 3, (7, 6), (3, 2)), units, None
    )
    assert problem is not None
    assert word in problem


def test_layers_of_the_other_type_are_refused(library: Library) -> None:
    plain = pack(SparseWeight.from_dense(np.ones((3, 4, 1, 1), np.float32)))
    case = Convolution(1, 1, 4, 3, (2, 2))
    found = np.zeros((1, 3, 2, 2), np.uint8)
    problem = run_conv_int8(plain, np.zeros((1, 4, 2, 2), np.uint8), found, case, Units(), None)
    assert "type" in (problem or "")
    tokens = np.zeros((4, 4), np.uint8)
    assert "type" in (run_linear_int8(plain, tokens, np.zeros((4, 3), np.uint8), Units()) or "")
    assert "not linear" in (run_linear_int8(small_layer(), tokens, np.zeros((4, 6), np.uint8), Units()) or "")
    floats = np.zeros((1, 12, 7, 6), np.float32)
    case = Convolution(1, 2, 6, 3, (7, 6), (3, 2))
    assert "type" in (run_conv(small_layer(), floats, np.zeros((1, 6, 5, 5), np.float32), case, None) or "")
