"""Which layers of an ONNX model become sparse, what is fused into them, and that nothing else changes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nestify.engine.graph import make_sparse
from nestify.engine.library import Library
from nestify.engine.plan import Choice
from nestify.engine.session import Session

Array = NDArray[Any]
SIDE = 20
"""Pixels of a side: with 32 channels, a 1x1 convolution has 0.4 M MACs, and a 3x3 one 3.7 M."""


def sparse(*shape: int, density: float = 0.2, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * (rng.random(shape) < density)).astype(np.float32)


class Builder:
    """A model of nodes that are added one after the other."""

    def __init__(self, images: Sequence[int | str] = ("batch", 32, SIDE, SIDE)) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.images = images

    def constant(self, value: Array | float) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def conv(self, given: str, outputs: int = 32, **attributes: Any) -> str:
        """A 3x3 convolution of 32 channels that keeps the size."""
        weight = self.constant(sparse(outputs, 32 // attributes.get("group", 1), 3, 3, seed=len(self.nodes)))
        bias = self.constant(sparse(outputs, density=1))
        return self.node("Conv", given, weight, bias, **{"pads": [1, 1, 1, 1], **attributes})

    def model(self, *outputs: str) -> onnx.ModelProto:
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        images = helper.make_tensor_value_info("images", TensorProto.FLOAT, self.images)
        graph = helper.make_graph(self.nodes, "g", [images], ends, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture
def rewrite(library: Library, tmp_path: Path) -> Callable[..., tuple[list[str], list[Choice]]]:
    """Rewrites a model, checks that its result stays the same, and returns its operators and the choices."""

    def run(model: onnx.ModelProto, images: Array | None = None) -> tuple[list[str], list[Choice]]:
        if images is None:
            images = np.random.default_rng(5).standard_normal((2, 32, SIDE, SIDE)).astype(np.float32)
        plain = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        expected = plain.run(None, {"images": images})
        choices = make_sparse(model)
        onnx.save(model, tmp_path / "sparse.onnx")
        found = Session(tmp_path / "sparse.onnx", 2)(images)
        for ours, theirs in zip(found if len(expected) > 1 else [found], expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
        return [node.op_type for node in model.graph.node], choices

    return run


Rewrite = Callable[..., tuple[list[str], list[Choice]]]


def test_a_residual_block_is_two_operators(rewrite: Rewrite) -> None:
    net = Builder()
    first = net.node("Relu", net.conv("images"))
    block = net.node("Relu", net.node("Add", first, net.conv(first)))
    operators, choices = rewrite(net.model(block))
    assert operators == ["SparseConv", "SparseConv"]
    assert [choice.is_sparse for choice in choices] == [True, True]
    assert choices[0].macs == 32 * 32 * 9 * SIDE * SIDE
    assert choices[0].density == pytest.approx(0.2, abs=0.02)


def test_two_layers_that_are_added(rewrite: Rewrite) -> None:
    """The shortcut of a block is a layer too: one of the two takes the addition over."""
    net = Builder()
    operators, _ = rewrite(net.model(net.node("Add", net.conv("images"), net.conv("images"))))
    assert operators == ["SparseConv", "SparseConv"]


def test_clip_is_fused(rewrite: Rewrite) -> None:
    net = Builder()
    six = net.node("Clip", net.conv("images"), net.constant(0.0), net.constant(1.5))
    only_low = net.node("Clip", net.conv(six), net.constant(-0.5))
    only_high = net.node("Clip", net.conv(only_low), "", net.constant(2.0))
    assert rewrite(net.model(only_high))[0] == ["SparseConv"] * 3


def test_what_another_node_reads_is_not_fused(rewrite: Rewrite) -> None:
    net = Builder()
    conv = net.conv("images")
    both = net.node("Add", net.node("Relu", conv), net.node("Sigmoid", conv))
    assert sorted(rewrite(net.model(both))[0]) == ["Add", "Relu", "Sigmoid", "SparseConv"]
    net = Builder()
    conv = net.conv("images")
    relu = net.node("Relu", conv)
    assert rewrite(net.model(conv, relu))[0] == ["SparseConv", "Relu"]


def test_an_addition_after_the_clamp_is_not_fused(rewrite: Rewrite) -> None:
    net = Builder()
    operators, _ = rewrite(net.model(net.node("Add", net.node("Relu", net.conv("images")), "images")))
    assert operators == ["SparseConv", "Add"]


def test_an_addition_that_broadcasts_is_not_fused(rewrite: Rewrite) -> None:
    net = Builder()
    means = net.node("GlobalAveragePool", "images")
    operators, _ = rewrite(net.model(net.node("Add", net.conv("images"), means)))
    assert operators == ["GlobalAveragePool", "SparseConv", "Add"]


def test_a_layer_that_is_added_to_itself(rewrite: Rewrite) -> None:
    net = Builder()
    conv = net.conv("images")
    assert rewrite(net.model(net.node("Add", conv, conv)))[0] == ["SparseConv", "Add"]


@pytest.mark.parametrize(
    "attributes",
    [
        {"strides": [2, 1], "pads": [0, 1, 2, 0]},
        {"dilations": [2, 3], "pads": [2, 3, 2, 3]},
        {"group": 2},
        {"strides": [2, 2], "pads": [0, 0, 1, 1]},
    ],
)
def test_geometries(rewrite: Rewrite, attributes: dict[str, Any]) -> None:
    net = Builder()
    assert rewrite(net.model(net.conv("images", **attributes)))[0] == ["SparseConv"]


def test_auto_pad_stays_dense(rewrite: Rewrite) -> None:
    net = Builder()
    weight = net.constant(sparse(32, 32, 3, 3))
    operators, [choice] = rewrite(net.model(net.node("Conv", "images", weight, auto_pad="SAME_UPPER")))
    assert operators == ["Conv"]
    assert "auto_pad" in choice.reason


def test_depthwise_stays_dense(rewrite: Rewrite) -> None:
    net = Builder(("batch", 32, 60, 60))  # 1 M MACs
    images = np.random.default_rng(4).standard_normal((2, 32, 60, 60)).astype(np.float32)
    operators, [choice] = rewrite(net.model(net.conv("images", group=32)), images)
    assert operators == ["Conv"]
    assert "depthwise" in choice.reason


def tokens_model(*, density: float = 0.2, tokens: int = 50) -> tuple[Builder, Array, str]:
    """(B, tokens, 96) to (B, tokens, 128)."""
    net = Builder(("batch", tokens, 96))
    images = np.random.default_rng(5).standard_normal((2, tokens, 96)).astype(np.float32)
    return net, images, net.constant(sparse(96, 128, density=density))


def test_linear_layers_on_tokens(rewrite: Rewrite) -> None:
    net, images, weight = tokens_model()
    biased = net.node("Add", net.constant(sparse(128, density=1)), net.node("MatMul", "images", weight))
    back = net.node("MatMul", biased, net.constant(sparse(128, 96, seed=3)))
    operators, choices = rewrite(net.model(net.node("Add", "images", back)), images)
    assert operators == ["SparseLinear", "SparseLinear"]
    assert [choice.macs for choice in choices] == [50 * 96 * 128] * 2


def test_gemm_scales(rewrite: Rewrite) -> None:
    """The rows of its input are 50 tokens of each image."""
    net, images, _ = tokens_model()
    net.constants.append(numpy_helper.from_array(np.array([-1, 96], np.int64), "rows"))
    weight, bias = net.constant(sparse(128, 96)), net.constant(sparse(1, 128, density=1))
    rows = net.node("Reshape", "images", "rows")
    gemm = net.node("Gemm", rows, weight, bias, transB=1, alpha=0.5, beta=2.0)
    assert rewrite(net.model(gemm), images[:1])[0] == ["Reshape", "SparseLinear"]


@pytest.mark.parametrize(
    ("density", "tokens", "reason"),
    [(0.5, 50, "not sparse enough"), (0.2, 3, "few positions"), (0.2, 20, "too small"), (0.2, 50, "")],
)
def test_the_rule(rewrite: Rewrite, density: float, tokens: int, reason: str) -> None:
    net, images, weight = tokens_model(density=density, tokens=tokens)
    [choice] = rewrite(net.model(net.node("MatMul", "images", weight)), images)[1]
    assert reason in choice.reason
    assert choice.is_sparse == (reason == "")


def test_the_choice_is_in_the_metadata(library: Library) -> None:
    net, _, weight = tokens_model()
    model = net.model(net.node("MatMul", "images", weight))
    helper.set_model_props(model, {"level": "1"})
    make_sparse(model)
    texts = {entry.key: entry.value for entry in model.metadata_props}
    assert texts["level"] == "1"
    [layer] = json.loads(texts["nestify_engine"])["layers"]
    assert layer == {
        **{"name": weight, "operator": "MatMul", "macs": 50 * 96 * 128, "reason": ""},
        "density": pytest.approx(0.2, abs=0.02),
    }


def test_dense_weights_are_gone_and_shared_ones_are_packed_once(rewrite: Rewrite) -> None:
    net, images, weight = tokens_model()
    other = net.node("MatMul", net.node("Neg", "images"), weight)
    model = net.model(net.node("Mul", net.node("MatMul", "images", weight), other))
    operators, _ = rewrite(model, images)
    assert operators.count("SparseLinear") == 2
    [packed] = model.graph.initializer
    assert packed.data_type == TensorProto.UINT8


def test_a_model_without_sparse_layers_stays_as_it_is(library: Library) -> None:
    net, _, weight = tokens_model(density=1)
    model = net.model(net.node("MatMul", "images", weight))
    before = model.graph.SerializeToString()
    make_sparse(model)
    assert model.graph.SerializeToString() == before
    assert [entry.domain for entry in model.opset_import] == [""]
