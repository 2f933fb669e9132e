"""Rewriting a quantised ONNX model: sparse and depthwise layers become the engine's int8 operators."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from nestify.engine.graph import DOMAIN, METADATA_KEY, drop_unused
from nestify.engine.model_graph import attributes
from nestify.engine.pack_int8 import QUAD, DepthwiseWeight, QuadWeight
from nestify.engine.plan import LEAST_MACS, LEAST_POSITIONS, Choice
from nestify.engine.quantised_graph import Quantised, QuantisedGraph

FORMAT = 2
HIGHEST_DENSITY = 0.55

STEM_TAPS = 49
"""Largest kernel of a dense layer that is packed if it reads one quad, as the first layer of a network does.

ONNX Runtime is slow at these, but faster where kernels are patches of 16x16.
"""

LEAST_PLANE = 49
"""Positions of a depthwise layer's output from which on the engine is faster than ONNX Runtime: 7 x 7."""

LARGEST_MULTIPLIER = 0.5
"""What the packed format allows; see native/packed.h."""

EMPTY_MULTIPLIER = np.float32(2**-16)


@dataclass
class Int8Layer:
    """A layer that is packed, and the nodes that are fused into it.

    Attributes:
        node: the Conv, Gemm or MatMul.
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
    weight: QuadWeight | DepthwiseWeight
    scales: NDArray[np.float32]
    bias: NDArray[np.int32] | None
    input: Quantised
    output: Quantised
    fused: list[Any] = field(default_factory=list)
    residual: Quantised | None = None
    has_relu: bool = False


def make_sparse_int8(model: onnx.ModelProto) -> list[Choice]:
    """Replace, in place, quantised layers that the engine runs faster than ONNX Runtime.

    Args:
        model: a model with int8 weights per channel and uint8 activations, as QuantizeLinear and
            DequantizeLinear nodes.

    Returns:
        One entry per quantised convolution or linear layer.

    Raises:
        UnsupportedModelError: if a layer cannot be packed.
        SetupError: if the engine's library is missing.
    """
    graph = QuantisedGraph(model)
    layers, choices = _plan(graph)
    _rewrite(model, graph, layers)
    document = {"format": FORMAT, "layers": [vars(choice) for choice in choices]}
    helper.set_model_props(
        model,
        {**{entry.key: entry.value for entry in model.metadata_props}, METADATA_KEY: json.dumps(document)},
    )
    return choices


def _plan(graph: QuantisedGraph) -> tuple[list[Int8Layer], list[Choice]]:
    layers: list[Int8Layer] = []
    choices: list[Choice] = []
    taken: set[int] = set()
    for node in graph.nodes:
        found = _weight(graph, node)
        if found is None:
            continue
        source, weight = found
        groups = attributes(node).get("group", 1)
        is_depthwise = groups > 1 and weight.shape[:2] == (groups, 1)
        packed = DepthwiseWeight(weight[:, 0]) if is_depthwise else QuadWeight.from_dense(weight, groups)
        shape = graph.shape(node.output[0])
        positions = None if shape is None else prod(shape[2:] if node.op_type == "Conv" else shape[:-1])
        macs = None if positions is None else positions * weight.size
        layer = _read(graph, node, source, packed)
        reason = _why_dense(graph, node, packed, positions, layer)
        choices.append(Choice(source.input[0], node.op_type, round(packed.density, 6), macs, reason))
        if layer and not reason:
            (_take_residual if node.op_type == "Conv" else _take_bias)(graph, layer, taken)
            taken.update(id(fused) for fused in layer.fused)
            layers.append(layer)
    return layers, choices


def _weight(graph: QuantisedGraph, node: Any) -> tuple[Any, NDArray[np.int8]] | None:
    """Return the DequantizeLinear node of a layer's int8 weight, and the weight; None for any other node.

    The weight is (outputs, inputs per group, kernel height, kernel width).
    """
    if node.domain or node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    source = graph.producer(node.input[1], "DequantizeLinear")
    weight = None if source is None else graph.constant(source.input[0])
    if weight is None or weight.dtype != np.int8 or weight.ndim != (4 if node.op_type == "Conv" else 2):
        return None
    if node.op_type != "Conv":
        weight = (weight if attributes(node).get("transB", 0) else weight.T)[..., None, None]
    return source, weight


def _why_dense(
    graph: QuantisedGraph,
    node: Any,
    weight: QuadWeight | DepthwiseWeight,
    positions: int | None,
    layer: Int8Layer | None,
) -> str:
    """Return why a layer stays dense, or an empty string."""
    outputs, inputs, groups, height, width = weight.shape
    macs = None if positions is None else positions * outputs * inputs * groups * height * width
    options, is_depthwise = attributes(node), isinstance(weight, DepthwiseWeight)
    is_stem = node.op_type == "Conv" and inputs <= QUAD and height * width <= STEM_TAPS
    least = LEAST_PLANE if is_depthwise else 0 if node.op_type == "Conv" else LEAST_POSITIONS
    is_slow = options.get("strides", [1, 1])[-1] > 2 or options.get("dilations", [1, 1])[-1] > 1
    reasons = {
        "it uses auto_pad": options.get("auto_pad", b"NOTSET") != b"NOTSET",
        "it is depthwise, with several outputs per channel": groups > 1 and inputs == 1 and not is_depthwise,
        "it is depthwise, with a stride above 2 or dilated": is_depthwise and is_slow,
        "it is not sparse enough": weight.density > HIGHEST_DENSITY and not (is_depthwise or is_stem),
        "the size of its output is not known": macs is None,
        "it has too few positions": (positions or 0) < least,
        "it is too small": macs is not None and macs < LEAST_MACS and not is_depthwise,
        "it is not quantised as the engine needs": layer is None,
        # ONNX Runtime pools uint8 fast only in the layout that its own convolutions have.
        "its output is pooled": layer is not None and graph.is_pooled(layer.output.name),
        "the range of its output is too small": layer is not None and not _is_in_range(layer),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _read(
    graph: QuantisedGraph, node: Any, source: Any, weight: QuadWeight | DepthwiseWeight
) -> Int8Layer | None:
    """Return the layer of a node between quantised tensors; None where anything is not as needed."""
    options = attributes(node)
    if options.get("transA", 0) or options.get("alpha", 1.0) != 1 or options.get("beta", 1.0) != 1:
        return None
    scales = graph.constant(source.input[1])
    zeros = graph.constant(source.input[2]) if len(source.input) > 2 else np.zeros(1, np.int8)
    given = graph.dequantised(node.input[0])
    if scales is None or zeros is None or zeros.any() or given is None:
        return None
    axis = 0 if node.op_type == "Conv" or options.get("transB", 0) else 1
    if scales.size > 1 and attributes(source).get("axis", 1) % (4 if node.op_type == "Conv" else 2) != axis:
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


def _following_addition(
    graph: QuantisedGraph, layer: Int8Layer, taken: set[int]
) -> tuple[Any, Any, str] | None:
    """Return the dequantisation and the addition that follow a layer, and the name of what is added."""
    source = graph.consumer(layer.output.name, "DequantizeLinear")
    addition = None if source is None else graph.consumer(source.output[0], "Add")
    if source is None or addition is None or id(addition) in taken:
        return None
    return source, addition, next((name for name in addition.input if name != source.output[0]), "")


def _take_residual(graph: QuantisedGraph, layer: Int8Layer, taken: set[int]) -> None:
    """Take over an addition that follows, so that what is added is not rounded in between."""
    found = _following_addition(graph, layer, taken)
    if found is None:
        return
    source, addition, other = found
    added, shape = graph.dequantised(other), graph.shape(layer.node.output[0])
    if added is None or shape is None or graph.shape(other) != shape:
        return
    relu = graph.consumer(addition.output[0], "Relu")
    last = graph.consumer((relu or addition).output[0], "QuantizeLinear")
    result = None if last is None else graph.activations(last, last.output[0])
    if last is None or result is None or (layer.has_relu or layer.output.zero == 0):
        return
    if not _is_in_range(replace(layer, output=result)):
        return
    layer.residual, layer.output, layer.has_relu = added, result, relu is not None
    layer.fused += [source, addition, *([relu] if relu is not None else []), last]


def _take_bias(graph: QuantisedGraph, layer: Int8Layer, taken: set[int]) -> None:
    """Take over the addition of a bias after a MatMul, so that the product is not rounded in between."""
    found = _following_addition(graph, layer, taken)
    if found is None:
        return
    source, addition, other = found
    bias, last = graph.float_constant(other), graph.consumer(addition.output[0], "QuantizeLinear")
    result = None if last is None else graph.activations(last, last.output[0])
    if last is None or result is None or bias is None or bias.shape != layer.scales.shape:
        return
    if layer.bias is not None or layer.has_relu or not _is_in_range(replace(layer, output=result)):
        return
    sums = np.rint(bias / (layer.input.scale * layer.scales).astype(np.float64))
    limit = np.iinfo(np.int32)
    layer.bias = np.clip(sums, limit.min, limit.max).astype(np.int32)
    layer.output = result
    layer.fused += [source, addition, last]


def _rewrite(model: onnx.ModelProto, graph: QuantisedGraph, layers: Sequence[Int8Layer]) -> None:
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
    weight = layer.weight
    bias = (0 if layer.bias is None else layer.bias.astype(np.int64)) - layer.input.zero * weight.totals
    multipliers = _multipliers(layer)
    # The scale of an output without weights means nothing, and its sum is its bias.
    empty = weight.counts == 0
    bias = np.where(empty, np.rint(bias * multipliers / EMPTY_MULTIPLIER), bias)
    multipliers[empty] = EMPTY_MULTIPLIER
    limit = np.iinfo(np.int32)
    return weight.pack(np.clip(bias, limit.min, limit.max).astype(np.int32), multipliers)


def _multipliers(layer: Int8Layer) -> NDArray[np.float32]:
    """Return what one unit of each output's sum is in units of the output tensor."""
    return np.asarray(layer.input.scale * layer.scales / layer.output.scale, np.float32)


def _is_in_range(layer: Int8Layer) -> bool:
    """Return whether the packed format can hold the multipliers; those of empty rows do not count."""
    used = layer.weight.counts > 0
    return not bool((_multipliers(layer)[used] > LARGEST_MULTIPLIER).any())


def _operator(layer: Int8Layer, packed: str) -> Any:
    node, residual, output = layer.node, layer.residual, layer.output
    options: dict[str, Any] = {}
    if node.op_type == "Conv":
        given, defaults = attributes(node), {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1]}
        options = {name: list(given.get(name, value)) for name, value in defaults.items()}
        options["residual_zero"] = residual.zero if residual else 0
        options["residual_scale"] = float(residual.scale / output.scale) if residual else 1.0
    return helper.make_node(
        "SparseConvInt8" if node.op_type == "Conv" else "SparseLinearInt8",
        [layer.input.name, packed, *([residual.name] if residual else [])],
        [output.name],
        name=node.name,
        domain=DOMAIN,
        input_zero=layer.input.zero,
        output_zero=output.zero,
        low=output.zero if layer.has_relu else 0,
        high=255,
        **options,
    )
