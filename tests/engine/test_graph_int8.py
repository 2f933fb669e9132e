"""Which layers of a quantised model become sparse, what is fused, and that the result stays the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from nestify.engine.graph_int8 import make_sparse_int8
from nestify.engine.library import Library
from nestify.engine.plan import Choice
from nestify.engine.session import Session
from nestify.evaluation.runtimes import optimise, quantise_optimised, sums_saturate
from tests.engine.test_graph import SIDE, Builder

Found = tuple[list[Any], list[Choice]]
Rewrite = Callable[..., Found]


class QuadBuilder(Builder):
    """A model of convolutions whose weights are zero in quads of inputs."""

    def conv(self, given: str, outputs: int = 32, *, density: float = 0.3, **attributes: Any) -> str:
        """A 3x3 convolution of 32 channels that keeps the size, without bias."""
        rng = np.random.default_rng(len(self.nodes))
        inputs = 32 // attributes.get("group", 1)
        kept = rng.random((outputs, -(-inputs // 4), 3, 3)) < density
        weight = rng.standard_normal((outputs, inputs, 3, 3)) * kept.repeat(4, axis=1)[:, :inputs]
        return self.node("Conv", given, self.constant(weight / 8), **{"pads": [1, 1, 1, 1], **attributes})


def biased(builder: QuadBuilder, given: str) -> str:
    """A convolution with a bias."""
    name = builder.conv(given)
    bias = np.random.default_rng(9).standard_normal(32)
    builder.nodes[-1].input.append(builder.constant(bias))
    return name


def linear(builder: QuadBuilder, given: str, *, bias: bool = True, density: float = 0.3) -> str:
    """A linear layer from SIDE to 48 features, as exports of transformers have it."""
    rng = np.random.default_rng(len(builder.nodes))
    kept = rng.random((-(-SIDE // 4), 48)) < density
    weight = rng.standard_normal((SIDE, 48)) * kept.repeat(4, axis=0)[:SIDE]
    name = builder.node("MatMul", given, builder.constant(weight / 4))
    return builder.node("Add", name, builder.constant(rng.standard_normal(48))) if bias else name


@pytest.fixture
def rewrite(library: Library, tmp_path: Path) -> Rewrite:
    """Quantises and rewrites a model, and compares it with what ONNX Runtime computes in float32 and int8.

    Where the sums of its int8 kernels saturate, which run what stays dense, weights have a reduced range.
    """

    def run(model: onnx.ModelProto) -> Found:
        images = np.random.default_rng(5).standard_normal((3, 32, SIDE, SIDE)).astype(np.float32)
        onnx.save(model, tmp_path / "plain.onnx")
        optimise(tmp_path / "plain.onnx", tmp_path / "optimised.onnx")
        quantise_optimised(
            tmp_path / "optimised.onnx", tmp_path / "int8.onnx", images, reduce_range=sums_saturate()
        )
        plain, int8 = (
            onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"]).run(
                None, {"images": images}
            )[0]
            for name in ("plain.onnx", "int8.onnx")
        )
        rewritten = onnx.load(tmp_path / "int8.onnx")
        choices = make_sparse_int8(rewritten)
        onnx.save(rewritten, tmp_path / "sparse.onnx")
        found = Session(tmp_path / "sparse.onnx", 2)(images)
        step = (plain.max() - plain.min()) / 255
        assert np.abs(found - int8).max() < 3.5 * step
        # What is fused is rounded once less, so that it is nearer to float32 than ONNX Runtime's int8 is.
        assert np.abs(found - plain).mean() < 1.02 * np.abs(int8 - plain).mean()
        return list(rewritten.graph.node), choices

    return run


def operators(nodes: list[Any]) -> list[str]:
    return [node.op_type for node in nodes]


def options(node: Any) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def test_activations_stay_in_8_bits(rewrite: Rewrite) -> None:
    builder = QuadBuilder()
    first = builder.node("Relu", builder.conv("images"))
    second = builder.node("Relu", biased(builder, first))
    nodes, choices = rewrite(builder.model(builder.conv(second, strides=[2, 2])))
    assert operators(nodes) == ["QuantizeLinear", *["SparseConvInt8"] * 3, "DequantizeLinear"]
    assert [choice.reason for choice in choices] == [""] * 3
    assert options(nodes[3])["strides"] == [2, 2]


def test_a_residual_is_added_inside(rewrite: Rewrite) -> None:
    builder = QuadBuilder()
    first = builder.node("Relu", builder.conv("images"))
    added = builder.node("Relu", builder.node("Add", builder.conv(first), first))
    nodes, _ = rewrite(builder.model(builder.conv(added)))
    assert operators(nodes) == ["QuantizeLinear", *["SparseConvInt8"] * 3, "DequantizeLinear"]
    assert list(nodes[2].input)[2] == nodes[1].output[0]


def test_two_convolutions_that_are_added(rewrite: Rewrite) -> None:
    """One of them takes the sum over, the other stays a tensor of its own."""
    builder = QuadBuilder()
    first = builder.node("Relu", builder.conv("images"))
    added = builder.node("Add", builder.conv(first), builder.conv(first))
    nodes, _ = rewrite(builder.model(builder.conv(added)))
    assert operators(nodes) == ["QuantizeLinear", *["SparseConvInt8"] * 4, "DequantizeLinear"]
    assert [len(node.input) for node in nodes[1:5]] == [2, 2, 3, 2]


def test_a_clamped_convolution_keeps_its_clamp_before_the_sum(rewrite: Rewrite) -> None:
    builder = QuadBuilder()
    first = builder.node("Relu", builder.conv("images"))
    clamped = builder.node("Relu", builder.conv(first))
    nodes, _ = rewrite(builder.model(builder.conv(builder.node("Add", clamped, first))))
    assert operators(nodes).count("Add") == 1


@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers(rewrite: Rewrite, bias: bool) -> None:
    """The last dimension of the images serves as features; a bias that is added is part of the layer."""
    builder = QuadBuilder()
    nodes, choices = rewrite(builder.model(linear(builder, "images", bias=bias)))
    assert operators(nodes) == ["QuantizeLinear", "SparseLinearInt8", "DequantizeLinear"]
    assert [(choice.operator, choice.reason) for choice in choices] == [("MatMul", "")]


def test_a_linear_layer_on_few_tokens_stays_dense(rewrite: Rewrite) -> None:
    builder = QuadBuilder()
    builder.constants.append(numpy_helper.from_array(np.array([1, 2]), "axes"))
    pooled = builder.node("ReduceMean", "images", "axes", keepdims=0)
    nodes, choices = rewrite(builder.model(linear(builder, pooled)))
    assert "SparseLinearInt8" not in operators(nodes)
    assert choices[0].reason == "it has too few positions"


def test_groups(rewrite: Rewrite) -> None:
    builder = QuadBuilder()
    nodes, _ = rewrite(builder.model(builder.conv(builder.conv("images", group=4))))
    assert operators(nodes).count("SparseConvInt8") == 2


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [3, 5])
def test_depthwise_layers(rewrite: Rewrite, stride: int, side: int) -> None:
    """They are packed with all of their weights; with a residual too."""
    builder = QuadBuilder()
    first = builder.node("Relu", builder.conv("images"))
    shape, around = (32, 1, side, side), [side // 2] * 4
    weight = builder.constant(np.random.default_rng(3).standard_normal(shape) / side)
    depthwise = builder.node("Conv", first, weight, group=32, pads=around, strides=[stride, stride])
    last = builder.node("Add", depthwise, first) if stride == 1 else depthwise
    nodes, choices = rewrite(builder.model(builder.conv(last)))
    assert operators(nodes) == ["QuantizeLinear", *["SparseConvInt8"] * 3, "DequantizeLinear"]
    assert choices[1].density > 0.95
    assert len(nodes[2].input) == (3 if stride == 1 else 2)


def test_depthwise_layers_of_small_images_stay_dense(rewrite: Rewrite) -> None:
    builder = QuadBuilder()
    small = builder.conv("images", strides=[3, 3])
    _, choices = rewrite(builder.model(builder.conv(builder.conv(small, group=32, strides=[2, 2]))))
    assert choices[1].reason == "it has too few positions"


def test_few_inputs_are_packed_though_they_are_dense(rewrite: Rewrite) -> None:
    """As those of the first convolution, which reads the channels of an image."""
    builder = QuadBuilder()
    nodes, choices = rewrite(builder.model(builder.conv("images", 64, group=8, density=1)))
    assert "SparseConvInt8" in operators(nodes)
    assert choices[0].density > 0.95


def test_outputs_without_weights(rewrite: Rewrite) -> None:
    """Their scale, which the quantiser chooses freely, has no influence."""
    builder = QuadBuilder()
    name = biased(builder, "images")
    [weight, _] = builder.constants
    emptied = numpy_helper.to_array(weight).copy()
    emptied[3:7] = 0
    weight.CopyFrom(numpy_helper.from_array(emptied, weight.name))
    nodes, _ = rewrite(builder.model(builder.conv(name)))
    assert operators(nodes).count("SparseConvInt8") == 2


def test_what_stays_dense_has_a_reason(rewrite: Rewrite) -> None:
    builder = QuadBuilder()
    dense = builder.conv("images", density=1)
    pooled = builder.node(
        "MaxPool", builder.conv(dense), kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1]
    )
    dilated = builder.conv(pooled, group=32, pads=[2, 2, 2, 2], dilations=[2, 2])
    several = builder.conv(dilated, 64, group=32)
    fewer = builder.node("MaxPool", several, kernel_shape=[3, 3], strides=[2, 2])
    wide = builder.constant(np.random.default_rng(4).standard_normal((32, 64, 1, 1)))
    small = builder.conv(builder.node("Conv", fewer, wide), strides=[10, 10])
    nodes, choices = rewrite(builder.model(small))
    words = ["not sparse", "pooled", "or dilated", "several outputs", "not sparse", "too small"]
    for choice, word in zip(choices, words, strict=True):
        assert word in choice.reason
    assert "SparseConvInt8" not in operators(nodes)


def test_choices_are_in_the_metadata(rewrite: Rewrite, tmp_path: Path) -> None:
    builder = QuadBuilder()
    rewrite(builder.model(builder.conv("images")))
    document = Session(tmp_path / "sparse.onnx", 1).metadata["nestify_engine"]
    assert json.loads(json.dumps(document))["layers"][0]["reason"] == ""
