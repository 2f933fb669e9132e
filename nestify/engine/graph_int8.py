"""Rewriting a quantised ONNX model: convolutions whose weight has few quads become SparseConvInt8."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from nestify.engine.graph import DOMAIN, METADATA_KEY, drop_unused
from nestify.engine.model_graph import ModelGraph, attributes
from nestify.engine.pack_int8 import QuadWeight, pack_int8
from nestify.engine.plan import Choice

FORMAT = 2
HIGHEST_DENSITY = 0.55
LEAST_MACS = 500_000
LARGEST_MULTIPLIER = 0.5
"""What the packed format allows; see native/packed.h."""

EMPTY_MULTIPLIER = np.float32(2**-16)


@dataclass(frozen=True)
class Quantised:
    """A tensor in 8 bits.

    Attributes:
        name: the tensor.
        scale: float32 scalar: what one unit is.
        zero: the value that stands for 0.
    """

    name: str
    scale: np.float32
    zero: int


@dataclass
class Int8Layer:
    """A convolution that becomes sparse, and the nodes that are fused into it.

    Attributes:
        node: the Conv.
        weight: its weight.
        scales: float32 (outputs,): units of the weight.
        bias: int32 (outputs,), in units of the sums; None for zeros.
        input: its activations.
        output: what the last fused node computes.
        fused: nodes after `node` that the new one replaces too, in order.
        residual: what is added, or None.
        has_relu: whether negative results become 0.
    """

    node: Any
    weight: QuadWeight
    scales: NDArray[np.float32]
    bias: NDArray[np.int32] | None
    input: Quantised
    output: Quantised
    fused: list[Any] = field(default_factory=list)
    residual: Quantised | None = None
    has_relu: bool = False


def make_sparse_int8(model: onnx.ModelProto) -> list[Choice]:
    """Replace, in place, quantised convolutions that the engine runs faster than ONNX Runtime.

    Args:
        model: a model with int8 weights per channel and uint8 activations, as QuantizeLinear and
            DequantizeLinear nodes.

    Returns:
        One entry per quantised convolution.

    Raises:
        UnsupportedModelError: if a layer cannot be packed.
        SetupError: if the engine's library is missing.
    """
    graph = _QuantisedGraph(model)
    layers, choices = _plan(graph)
    _rewrite(model, graph, layers)
    document = {"format": FORMAT, "layers": [vars(choice) for choice in choices]}
    helper.set_model_props(
        model,
        {**{entry.key: entry.value for entry in model.metadata_props}, METADATA_KEY: json.dumps(document)},
    )
    return choices


class _QuantisedGraph(ModelGraph):
    """Look-ups in a graph of QuantizeLinear and DequantizeLinear nodes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self.producers = {name: node for node in self.nodes for name in node.output}

    def producer(self, name: str, operator: str) -> Any | None:
        """Return the node that computes a tensor if it is this operator, else None."""
        node = self.producers.get(name)
        return node if node is not None and not node.domain and node.op_type == operator else None

    def consumer(self, name: str, operator: str) -> Any | None:
        """Return the node that alone reads a tensor if it is this operator, else None."""
        node = self.only_consumer(name)
        return node if node is not None and not node.domain and node.op_type == operator else None

    def activations(self, node: Any, name: str) -> Quantised | None:
        """Return a tensor as a QuantizeLinear or DequantizeLinear node describes it; None unless uint8."""
        scale, zero = self.constant(node.input[1]), None
        if len(node.input) > 2:
            zero = self.constant(node.input[2])
        if scale is None or zero is None or zero.dtype != np.uint8 or scale.size != 1 or zero.size != 1:
            return None
        return Quantised(name, np.float32(scale.reshape(())), int(zero.reshape(())))

    def dequantised(self, name: str) -> Quantised | None:
        """Return the uint8 tensor that a float tensor is computed from, or None."""
        node = self.producer(name, "DequantizeLinear")
        return None if node is None else self.activations(node, node.input[0])

    def is_pooled(self, name: str) -> bool:
        """Return whether a MaxPool reads a tensor, dequantised."""
        readers = [node for source in self.consumers[name] for node in self.consumers[source.output[0]]]
        return any(node.op_type == "MaxPool" for node in readers)


def _plan(graph: _QuantisedGraph) -> tuple[list[Int8Layer], list[Choice]]:
    layers: list[Int8Layer] = []
    choices: list[Choice] = []
    taken: set[int] = set()
    for node in graph.nodes:
        if node.domain or node.op_type != "Conv":
            continue
        source = graph.producer(node.input[1], "DequantizeLinear")
        weight = None if source is None else graph.constant(source.input[0])
        if source is None or weight is None or weight.dtype != np.int8 or weight.ndim != 4:
            continue
        options = attributes(node)
        groups = options.get("group", 1)
        quads = QuadWeight.from_dense(weight, groups)
        shape = graph.shape(node.output[0])
        macs = None if shape is None else prod(shape[2:]) * weight.size
        layer = _read(graph, node, source, quads)
        reason = _why_dense(graph, node, quads, macs, layer)
        choices.append(Choice(source.input[0], "Conv", round(quads.density, 6), macs, reason))
        if layer and not reason:
            _take_residual(graph, layer, taken)
            taken.update(id(fused) for fused in layer.fused)
            layers.append(layer)
    return layers, choices


def _why_dense(
    graph: _QuantisedGraph, node: Any, weight: QuadWeight, macs: int | None, layer: Int8Layer | None
) -> str:
    """Return why a layer stays dense, or an empty string."""
    _, inputs, groups, _, _ = weight.shape
    used = np.diff(weight.starts) > 0
    reasons = {
        "it uses auto_pad": attributes(node).get("auto_pad", b"NOTSET") != b"NOTSET",
        "it is depthwise": groups > 1 and inputs == 1,
        "it is not sparse enough": weight.density > HIGHEST_DENSITY,
        "the size of its output is not known": macs is None,
        "it is too small": macs is not None and macs < LEAST_MACS,
        "it is not quantised as the engine needs": layer is None,
        # ONNX Runtime pools uint8 fast only in the layout that its own convolutions have.
        "its output is pooled": layer is not None and graph.is_pooled(layer.output.name),
        "the range of its output is too small": layer is not None
        and bool((_multipliers(layer)[used] > LARGEST_MULTIPLIER).any()),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _read(graph: _QuantisedGraph, node: Any, source: Any, weight: QuadWeight) -> Int8Layer | None:
    """Return the layer of a Conv between quantised tensors; None where anything is not as needed."""
    scales = graph.constant(source.input[1])
    zeros = graph.constant(source.input[2]) if len(source.input) > 2 else np.zeros(1, np.int8)
    given = graph.dequantised(node.input[0])
    if scales is None or zeros is None or zeros.any() or given is None:
        return None
    if scales.size > 1 and attributes(source).get("axis", 1) != 0:
        return None
    outputs = weight.shape[0] * weight.shape[2]
    bias = None
    if len(node.input) > 2 and node.input[2]:
        biased = graph.producer(node.input[2], "DequantizeLinear")
        bias = None if biased is None else graph.constant(biased.input[0])
        if bias is None or bias.dtype != np.int32:
            return None
    fused = []
    step = graph.consumer(node.output[0], "Relu")
    if step is not None:
        fused.append(step)
    last = graph.consumer((step or node).output[0], "QuantizeLinear")
    result = None if last is None else graph.activations(last, last.output[0])
    if last is None or result is None:
        return None
    scales = np.broadcast_to(scales.reshape(-1), (outputs,)).astype(np.float32)
    return Int8Layer(node, weight, scales, bias, given, result, [*fused, last], None, step is not None)


def _take_residual(graph: _QuantisedGraph, layer: Int8Layer, taken: set[int]) -> None:
    """Take over an addition that follows, so that what is added is not rounded in between."""
    source = graph.consumer(layer.output.name, "DequantizeLinear")
    addition = None if source is None else graph.consumer(source.output[0], "Add")
    if source is None or addition is None or id(addition) in taken:
        return
    other = next((name for name in addition.input if name != source.output[0]), "")
    added, shape = graph.dequantised(other), graph.shape(layer.node.output[0])
    if added is None or shape is None or graph.shape(other) != shape:
        return
    relu = graph.consumer(addition.output[0], "Relu")
    last = graph.consumer((relu or addition).output[0], "QuantizeLinear")
    result = None if last is None else graph.activations(last, last.output[0])
    if last is None or result is None or (layer.has_relu or layer.output.zero == 0):
        return
    layer.residual, layer.output, layer.has_relu = added, result, relu is not None
    layer.fused += [source, addition, *([relu] if relu is not None else []), last]


def _rewrite(model: onnx.ModelProto, graph: _QuantisedGraph, layers: Sequence[Int8Layer]) -> None:
    replacements: dict[int, Any] = {}  # by the id of the last node that is replaced
    dropped: set[int] = set()
    for number, layer in enumerate(layers):
        dropped.update(id(node) for node in (layer.node, *layer.fused))
        name = f"{layer.node.name or layer.output.name}.packed{number}"
        model.graph.initializer.append(numpy_helper.from_array(_pack(layer), name))
        replacements[id(layer.fused[-1])] = _operator(layer, name)
    nodes = [
        replacements.get(id(node), node)
        for node in graph.nodes
        if id(node) in replacements or id(node) not in dropped
    ]
    read = {value.name for value in model.graph.output} | graph.inner
    kept = []
    for node in reversed(nodes):  # dequantisation of weights that are packed now, and of fused tensors
        if node.op_type != "DequantizeLinear" or not read.isdisjoint(node.output):
            kept.append(node)
            read.update(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    drop_unused(model)
    if layers:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _pack(layer: Int8Layer) -> NDArray[np.uint8]:
    weight, outputs = layer.weight, len(layer.scales)
    rows = np.repeat(np.arange(outputs), np.diff(weight.starts))
    totals = np.zeros(outputs, np.int64)
    np.add.at(totals, rows, weight.quads.sum(axis=1, dtype=np.int64))
    bias = (0 if layer.bias is None else layer.bias.astype(np.int64)) - layer.input.zero * totals
    multipliers = _multipliers(layer)
    # The scale of an output without weights means nothing, and its sum is its bias.
    empty = np.diff(weight.starts) == 0
    bias = np.where(empty, np.rint(bias * multipliers / EMPTY_MULTIPLIER), bias)
    multipliers[empty] = EMPTY_MULTIPLIER
    limit = np.iinfo(np.int32)
    return pack_int8(weight, np.clip(bias, limit.min, limit.max).astype(np.int32), multipliers)


def _multipliers(layer: Int8Layer) -> NDArray[np.float32]:
    """Return what one unit of each output's sum is in units of the output tensor."""
    return np.asarray(layer.input.scale * layer.scales / layer.output.scale, np.float32)


def _operator(layer: Int8Layer, packed: str) -> Any:
    options = attributes(layer.node)
    defaults = {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1]}
    geometry: dict[str, Any] = {name: list(options.get(name, value)) for name, value in defaults.items()}
    residual, output = layer.residual, layer.output
    return helper.make_node(
        "SparseConvInt8",
        [layer.input.name, packed, *([residual.name] if residual else [])],
        [output.name],
        name=layer.node.name,
        domain=DOMAIN,
        input_zero=layer.input.zero,
        output_zero=output.zero,
        low=output.zero if layer.has_relu else 0,
        high=255,
        residual_zero=residual.zero if residual else 0,
        residual_scale=float(residual.scale / output.scale) if residual else 1.0,
        **geometry,
    )
