"""A packed layer may come from anywhere: damage is refused; accepted layers never read out of bounds."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nestify.engine.library import Library
from nestify.engine.pack import Bytes, SparseWeight, check_packed, pack
from nestify.engine.session import Session
from nestify.errors import BadFileError
from nestify.exports.target import PackedType
from tests.engine.oracle import Convolution, random_floats, run_conv


def small_layer(dtype: PackedType = PackedType.float32) -> Bytes:
    """Two groups of 3 outputs and 4 inputs, kernels of 3x2, blocks of two channels."""
    rng = np.random.default_rng(0)
    weight = random_floats(rng, 6, 4, 3, 2) * (rng.random((6, 4, 3, 2)) < 0.5)
    return pack(SparseWeight.from_dense(weight, 2), random_floats(rng, 6), 12, dtype)


def places(packed: Bytes) -> dict[str, int]:
    """Offsets of the arrays of `small_layer`: two groups, two blocks, three outputs."""
    weights = int(packed[32:40].view("<u8")[0])
    starts = 64
    values = starts + 4 * (2 * 2 * 3 + 1)
    columns = values + 4 * weights + 4 * 6
    return {"starts": starts, "values": values, "columns": columns, "order": columns + 2 * weights}


@pytest.mark.parametrize(
    ("place", "dtype", "value", "word"),
    [
        (0, "<u4", 1, "not a packed layer"),
        (4, "<u4", 0, "format 0"),
        (4, "<u4", 2, "size"),
        (4, "<u4", 3, "channels"),
        (4, "<u4", 5, "format 5"),
        (8, "<u4", 0, "outputs"),
        (8, "<u4", 2**31, "outputs"),
        (12, "<u4", 2**31, "inputs"),
        (16, "<u4", 0, "groups"),
        (20, "<u4", 0, "kernel"),
        (20, "<u4", 32_000, "size"),
        (28, "<u4", 0, "blocks"),
        (28, "<u4", 13, "blocks"),
        (32, "<u8", 2**63, "too many weights"),
        (32, "<u8", 1, "size"),
        (40, "<u4", 4, "channels"),
        (60, "<u4", 1, "reserved"),
        ("starts", "<i4", 1, "start"),
        ("starts", "<i4", -1, "start"),
        ("columns", "<u2", 12, "column"),
        ("columns", "<u2", 65535, "column"),
        ("order", "<u2", 3, "output"),
    ],
)
def test_damage_is_named(library: Library, place: int | str, dtype: str, value: int, word: str) -> None:
    packed = small_layer()
    offset = places(packed)[place] if isinstance(place, str) else place
    packed[offset : offset + np.dtype(dtype).itemsize].view(dtype)[0] = value
    problem = check_packed(packed)
    assert problem is not None
    assert word in problem


def test_an_output_that_is_computed_twice_is_refused(library: Library) -> None:
    """Another one would be left out, and what memory holds would be its result."""
    packed = small_layer()
    order = packed[places(packed)["order"] :].view("<u2")
    order[1] = order[0]
    assert "each output once" in (check_packed(packed) or "")


def test_a_last_start_before_the_end_is_refused(library: Library) -> None:
    packed = small_layer()
    starts = packed[64 : 64 + 4 * 13].view("<i4")
    starts[12] = starts[11]
    assert check_packed(packed) is not None


@pytest.mark.parametrize("size", [0, 1, 63, 64, -1])
def test_other_lengths_are_refused(library: Library, size: int) -> None:
    packed = small_layer()
    assert check_packed(packed[:size].copy()) is not None
    assert check_packed(np.concatenate([packed, packed[:4]])) is not None


def fuzz(seed: int, count: int, dtype: PackedType) -> int:
    """Damage layers at random; run those that are accepted. Returns how many were."""
    rng, sound = np.random.default_rng(seed), small_layer(dtype)
    images = random_floats(rng, 1, 8, 7, 6)
    case, accepted = Convolution(1, 2, 4, 3, (7, 6), (3, 2), (2, 1), (1, 0, 1, 1)), 0
    for _ in range(count):
        packed = sound.copy()
        for _ in range(int(rng.integers(1, 4))):
            kind = rng.integers(4)
            # Half of the damage is in the header, where one word changes the meaning of all others.
            place = int(rng.integers(64 if rng.random() < 0.5 else len(packed)))
            if kind == 0:
                packed[place] ^= 1 << rng.integers(8)
            elif kind == 1:
                packed[place] = rng.integers(256)
            elif kind == 2:
                word = packed[place // 4 * 4 : place // 4 * 4 + 4]
                word[:] = (
                    np.array(rng.choice([0, 1, 2, 12, 2**16, 2**31, 2**32 - 1]), "<u4")
                    .reshape(1)
                    .view(np.uint8)[: len(word)]
                )
            else:
                other = int(rng.integers(len(packed)))
                packed[place], packed[other] = packed[other], packed[place]
        if rng.random() < 0.1:
            packed = packed[: int(rng.integers(len(packed)))].copy()
        if check_packed(packed) is None:
            found = np.zeros((1, 6, 4, 6), np.float32)
            run_conv(packed, images, found, case, None)  # a changed kernel does not fit, and is refused there
            accepted += 1
    return accepted


@pytest.mark.parametrize("dtype", PackedType)
def test_damaged_layers_are_refused_or_harmless(library: Library, dtype: PackedType) -> None:
    assert 0 < fuzz(0, 3000, dtype) < 2500


@pytest.mark.long
@pytest.mark.parametrize("dtype", PackedType)
def test_many_damaged_layers(library: Library, dtype: PackedType) -> None:
    assert fuzz(1, 200_000, dtype) > 0


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0xFFFF])
def test_float16_weights_are_finite(library: Library, bits: int) -> None:
    packed = small_layer(PackedType.float16)
    first = 64 + 4 * (2 * 2 * 3 + 1) + 4 * 6
    packed[first : first + 2].view("<u2")[0] = bits
    assert "not finite" in (check_packed(packed) or "")


def model_of(packed: Bytes, operator: str = "SparseConv", **options: object) -> onnx.ModelProto:
    """A model of one operator, with a packed layer of 8 input channels."""
    attributes = {
        "low": 0.0,
        "high": 6.0,
        "strides": [1, 1],
        "pads": [0, 0, 0, 0],
        "dilations": [1, 1],
        **options,
    }
    node = helper.make_node(operator, ["images", "packed"], ["logits"], domain="nestify", **attributes)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *(f"{name}{d}" for d in range(3))])
        for name in ("images", "logits")
    ]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], [numpy_helper.from_array(packed, "packed")])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("nestify", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def opened(model: onnx.ModelProto, folder: Path) -> Session:
    onnx.save(model, folder / "model.onnx")
    return Session(folder / "model.onnx", 1)


def test_a_damaged_model_is_refused_when_it_is_opened(library: Library, tmp_path: Path) -> None:
    packed = small_layer()
    assert opened(model_of(packed), tmp_path)(np.zeros((1, 8, 5, 5), np.float32)).shape == (1, 6, 3, 4)
    packed[places(packed)["columns"] + 1] = 255
    with pytest.raises(BadFileError, match=r"model\.onnx.*packed layer is damaged.*export it again"):
        opened(model_of(packed), tmp_path)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"strides": [0, 1]}, "stride"), ({"pads": [0, 0, -5, 0]}, "padding"), ({"pads": [1, 1]}, "pads")],
)
def test_attributes_are_checked(
    library: Library, tmp_path: Path, options: dict[str, object], word: str
) -> None:
    with pytest.raises(BadFileError, match=word):
        opened(model_of(small_layer(), **options), tmp_path)


def test_a_kernel_is_not_linear(library: Library, tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match="not linear"):
        opened(model_of(small_layer(), "SparseLinear"), tmp_path)


def test_a_layer_that_is_computed_is_refused(library: Library, tmp_path: Path) -> None:
    model = model_of(small_layer())
    model.graph.input.append(helper.make_tensor_value_info("packed", TensorProto.UINT8, [len(small_layer())]))
    del model.graph.initializer[:]
    with pytest.raises(BadFileError, match="constant"):
        opened(model, tmp_path)
