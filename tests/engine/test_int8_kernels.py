"""Sparse int8 layers against NumPy's integers: every byte is equal, on every instruction set."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from nestify.engine.library import VARIABLE, Library
from nestify.engine.pack import Bytes, SparseWeight, check_packed, pack
from nestify.engine.pack_int8 import DepthwiseWeight, QuadWeight, pack_int8
from nestify.engine.session import start_session
from nestify.errors import BadFileError
from tests.engine.int8_oracle import (
    Units,
    random_case,
    random_depthwise,
    random_depthwise_case,
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
@given(seed=st.integers(0, 2**32 - 1))
def test_any_depthwise_layer(library: Library, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, expected = random_depthwise_case(rng, random_depthwise(rng), bool(seed % 2))
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


def depthwise_layer() -> Bytes:
    """12 channels, kernels of 3x2."""
    rng = np.random.default_rng(0)
    weight = DepthwiseWeight(rng.integers(-128, 128, (12, 3, 2)).astype(np.int8))
    return weight.pack(rng.integers(-99, 99, 12, np.int32), np.full(12, 0.01, np.float32))


@pytest.mark.parametrize(
    ("offset", "dtype", "value", "word"),
    [
        (8, "<u4", 2, "one of its channels in each group"),
        (12, "<u4", 2, "one of its channels in each group"),
        (40, "<u4", 0, "one of its channels in each group"),
        (16, "<u4", 11, "weights"),
        (16, "<u4", 2**31, "groups"),
        (20, "<u4", 4, "weights"),
        (24, "<u4", 5, "weights"),
        (28, "<u4", 6, "weights"),
        (32, "<u8", 35, "weights"),
        (60, "<u4", 1, "reserved"),
        (64 + 4 * 36 + 4 * 12, "<f4", np.nan, "multiplier"),
        (64 + 4 * 36 + 4 * 23, "<f4", 0.6, "multiplier"),
    ],
)
def test_damage_of_a_depthwise_layer_is_named(
    library: Library, offset: int, dtype: str, value: float, word: str
) -> None:
    packed = depthwise_layer()
    assert len(packed) == 64 + 4 * 36 + 4 * 12 + 4 * 12
    packed[offset : offset + np.dtype(dtype).itemsize].view(dtype)[0] = value
    assert word in (check_packed(packed) or "")


def fuzz(seed: int, count: int) -> int:
    """Damage layers at random; run those that are accepted. Returns how many were."""
    rng, sounds = np.random.default_rng(seed), (small_layer(), linear_layer(), depthwise_layer())
    images = rng.integers(0, 256, (1, 12, 7, 6), np.uint8)
    case, accepted = Convolution(1, 2, 6, 3, (7, 6), (3, 2), (2, 1), (1, 0, 1, 1)), 0
    for number in range(count):
        packed = sounds[number % 3].copy()
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(64 if rng.random() < 0.5 else len(packed)))
            packed[place] = rng.integers(256) if rng.random() < 0.5 else packed[place] ^ 1 << rng.integers(8)
        if check_packed(packed) is None:
            found = np.zeros((1, 12 if number % 3 == 2 else 6, 4, 6), np.uint8)
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
    single = DepthwiseWeight(np.ones((1, 1, 1), np.int8)).pack(None, np.full(1, 0.01, np.float32))
    for layer in (small_layer(), depthwise_layer(), single):
        assert "not linear" in (run_linear_int8(layer, tokens, np.zeros((4, 12), np.uint8), Units()) or "")
    floats = np.zeros((1, 12, 7, 6), np.float32)
    case = Convolution(1, 2, 6, 3, (7, 6), (3, 2))
    assert "type" in (run_conv(small_layer(), floats, np.zeros((1, 6, 5, 5), np.float32), case, None) or "")


def linear_model(packed: Bytes, *inputs: str, **options: int) -> onnx.ModelProto:
    """A model of one SparseLinearInt8 of 12 features, whose further inputs are the tokens again."""
    limits = {"input_zero": 3, "output_zero": 5, "low": 0, "high": 255, **options}
    node = helper.make_node(
        "SparseLinearInt8", ["tokens", "packed", *inputs], ["logits"], domain="nestify", **limits
    )
    ends = [
        helper.make_tensor_value_info(name, TensorProto.UINT8, ["batch", f"{name}1", f"{name}2"])
        for name in ("tokens", "logits")
    ]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], [numpy_helper.from_array(packed, "packed")])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("nestify", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def test_the_linear_operator(library: Library, tmp_path: Path) -> None:
    """In a session it computes what the C function does; what it cannot run is refused."""
    tokens = np.random.default_rng(1).integers(0, 256, (2, 7, 12), np.uint8)
    expected = np.zeros((14, 3), np.uint8)
    assert run_linear_int8(linear_layer(), tokens.reshape(14, 12), expected, Units(3, 5)) is None

    def session(packed: Bytes, *inputs: str, **options: int) -> Any:
        onnx.save(linear_model(packed, *inputs, **options), tmp_path / "linear.onnx")
        return start_session(tmp_path / "linear.onnx", 1)

    [found] = session(linear_layer()).run(None, {"tokens": tokens})
    np.testing.assert_array_equal(found, expected.reshape(2, 7, 3))
    for packed, options, word in [
        (small_layer(), {}, "not linear"),
        (pack(SparseWeight.from_dense(np.ones((3, 12), np.float32))), {}, "type"),
        (linear_layer(), {"low": 9, "high": 8}, "limit"),
    ]:
        with pytest.raises(BadFileError, match=word):
            session(packed, **options)
    with pytest.raises(Exception, match="features"):
        session(linear_layer()).run(None, {"tokens": tokens[..., :8]})
    with pytest.raises(Exception, match="residual"):
        session(linear_layer(), "tokens").run(None, {"tokens": tokens})
