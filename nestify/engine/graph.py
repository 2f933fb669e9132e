"""Rewriting an ONNX model: layers whose weight is sparse become the engine's operators.

The planner chooses layers and what is fused into each; the rewriter then carries the plan out.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf, prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from nestify.engine.pack import Floats, SparseWeight, pack

DOMAIN = "nestify"
METADATA_KEY = "nestify_engine"
FORMAT = 1

HIGHEST_DENSITY = 0.45
LEAST_MACS = 500_000
LEAST_TOKENS = 4


@dataclass(frozen=True)
class Choice:
    """What was decided about one layer.

    Attributes:
        name: name of its weight in the ONNX model.
        operator: Conv, Gemm or MatMul.
        density: share of its weights that are not zero, in [0, 1].
        macs: dense multiply-accumulates per image; None if its output's size is not known.
        reason: why it stays dense; empty if it becomes sparse.
    """

    name: str
    operator: str
    density: float
    macs: int | None
    reason: str

    @property
    def is_sparse(self) -> bool:
        """Whether the engine runs it."""
        return not self.reason


@dataclass
class _Layer:
    """A layer that becomes sparse, and the nodes that are fused into it.

    Attributes:
        node: the Conv, Gemm or MatMul.
        weight: its weight.
        bias: float32 (outputs,), or None.
        fused: nodes after `node` that the new one replaces too, in order.
        residual: name of the tensor that is added, or "".
        low: smallest value of the output.
        high: largest value.
    """

    node: Any
    weight: SparseWeight
    bias: Floats | None
    fused: list[Any] = field(default_factory=list)
    residual: str = ""
    low: float = -inf
    high: float = inf

    @property
    def output(self) -> str:
        """Name of the tensor that the last replaced node computes."""
        return str((self.fused or [self.node])[-1].output[0])


class _Graph:
    """Look-ups in a graph: constants, consumers of a tensor, and shapes for one image."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self.consumers = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.consumers[name].append(node)
        self.inner = set(_names_in_subgraphs(model.graph))
        self._shapes = _shapes_of_one_image(model)

    def constant(self, name: str) -> NDArray[Any] | None:
        """Return the value of an initializer; None for anything else."""
        tensor = self.initializers.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return a tensor's shape for one image; None if it is not known."""
        return self._shapes.get(name)

    def only_consumer(self, name: str) -> Any | None:
        """Return the node that alone reads a tensor; None if others do, or it is an output."""
        readers = self.consumers[name]
        if len(readers) != 1 or name in self.outputs or name in self.inner:
            return None
        return readers[0]


def make_sparse(model: onnx.ModelProto) -> list[Choice]:
    """Replace, in place, layers that the engine runs faster than ONNX Runtime.

    A layer is replaced if at most 45 % of its weights are not zero, and it has at least half a million dense
    MACs and four positions per image. Biases, residual additions, Relu and Clip that follow it are fused. The
    choices are stored in the model's metadata.

    Args:
        model: a model with float32 weights; its batch size may be open.

    Returns:
        One entry per layer with a constant weight.

    Raises:
        UnsupportedModelError: if a layer cannot be packed.
        SetupError: if the engine's library is missing.
    """
    graph = _Graph(model)
    layers, choices = _plan(graph)
    _rewrite(model, graph, layers)
    document = {"format": FORMAT, "layers": [vars(choice) for choice in choices]}
    helper.set_model_props(
        model,
        {**{entry.key: entry.value for entry in model.metadata_props}, METADATA_KEY: json.dumps(document)},
    )
    return choices


def _plan(graph: _Graph) -> tuple[list[_Layer], list[Choice]]:
    layers: list[_Layer] = []
    choices: list[Choice] = []
    taken: set[int] = set()  # ids of nodes that are fused into a layer
    for node in graph.nodes:
        found = _read_layer(graph, node)
        if found is None:
            continue
        weight, bias, unsupported = found
        shape = graph.shape(node.output[0])
        positions = None if shape is None else prod(shape[2:] if node.op_type == "Conv" else shape[:-1])
        rows = weight.shape[0] * weight.shape[2]
        macs = None if positions is None else positions * rows * prod(weight.shape[1:2] + weight.shape[3:])
        reason = unsupported or _why_dense(weight.density, macs, positions)
        choices.append(Choice(node.input[1], node.op_type, round(weight.density, 6), macs, reason))
        if not reason:
            layer = _Layer(node, weight, bias)
            _fuse(graph, layer, taken)
            taken.update(id(fused) for fused in layer.fused)
            layers.append(layer)
    return layers, choices


def _why_dense(density: float, macs: int | None, positions: int | None) -> str:
    if density > HIGHEST_DENSITY:
        return "it is not sparse enough"
    if macs is None or positions is None:
        return "the size of its output is not known"
    if positions < LEAST_TOKENS:
        return "it has too few positions"
    return "it is too small" if macs < LEAST_MACS else ""


def _read_layer(graph: _Graph, node: Any) -> tuple[SparseWeight, Floats | None, str] | None:
    """Return a layer's weight, its bias, and why the engine does not know it; None if it is no such layer."""
    if node.domain or node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    weight, attributes = graph.constant(node.input[1]), _attributes(node)
    if weight is None or weight.dtype != np.float32 or weight.ndim not in (2, 4):
        return None
    bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    has_bias = len(node.input) > 2 and bool(node.input[2])
    unsupported = "its bias is not a constant" if has_bias and bias is None else ""
    if node.op_type == "Conv":
        if attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
            unsupported = "it uses auto_pad"
        return SparseWeight.from_dense(weight, attributes.get("group", 1)), bias, unsupported
    if node.op_type == "MatMul":
        return SparseWeight.from_dense(weight.T), None, unsupported
    if attributes.get("transA", 0):
        unsupported = "its input is transposed"
    rows = (weight if attributes.get("transB", 0) else weight.T) * np.float32(attributes.get("alpha", 1.0))
    if bias is not None:
        if bias.size not in (1, len(rows)) or (bias.ndim > 1 and bias.shape[0] != 1):
            unsupported = "its bias differs between rows"
        else:
            bias = np.broadcast_to(bias.reshape(-1) * np.float32(attributes.get("beta", 1.0)), (len(rows),))
    return SparseWeight.from_dense(rows), bias, unsupported


def _fuse(graph: _Graph, layer: _Layer, taken: set[int]) -> None:
    """Take over the nodes that follow a layer, as far as the operator computes them."""
    outputs = layer.weight.shape[0] * layer.weight.shape[2]
    for step in (_take_bias, _take_residual, _take_clamp):
        node = graph.only_consumer(layer.output)
        if (
            node is not None
            and not node.domain
            and id(node) not in taken
            and step(graph, layer, node, outputs)
        ):
            layer.fused.append(node)


def _take_bias(graph: _Graph, layer: _Layer, node: Any, outputs: int) -> bool:
    """A bias that is added after a MatMul."""
    if node.op_type != "Add" or layer.node.op_type != "MatMul":
        return False
    bias = graph.constant(_other_input(node, layer.output))
    if bias is None or bias.dtype != np.float32 or bias.shape != (outputs,):
        return False
    layer.bias = bias
    return True


def _take_residual(graph: _Graph, layer: _Layer, node: Any, outputs: int) -> bool:
    """A tensor of the same shape that is added; where shapes differ, it would have to be broadcast."""
    other = _other_input(node, layer.output) if node.op_type == "Add" else ""
    shape = graph.shape(layer.output)
    if not other or other in graph.initializers or shape is None or graph.shape(other) != shape:
        return False
    layer.residual = other
    return True


def _take_clamp(graph: _Graph, layer: _Layer, node: Any, outputs: int) -> bool:
    if node.op_type == "Relu":
        layer.low = 0.0
        return True
    if node.op_type != "Clip" or len(node.input) < 2:
        return False
    limits = []
    for place, default in ((1, -inf), (2, inf)):
        name = node.input[place] if len(node.input) > place else ""
        value = graph.constant(name) if name else np.float32(default)
        if value is None or value.dtype != np.float32 or value.size != 1:
            return False
        limits.append(float(value.reshape(())))
    layer.low, layer.high = limits
    return True


def _other_input(node: Any, name: str) -> str:
    """Return the input of an addition that is not `name`; "" if both are."""
    return next((other for other in node.input if other != name), "")


def _rewrite(model: onnx.ModelProto, graph: _Graph, layers: Sequence[_Layer]) -> None:
    replacements: dict[int, Any] = {}  # by the id of the last node that is replaced
    dropped: set[int] = set()
    packed: dict[tuple[str, ...], str] = {}  # layers that share a weight and a bias share the packed layer
    for layer in layers:
        replaced = [layer.node, *layer.fused]
        dropped.update(id(node) for node in replaced)
        key = (
            layer.node.op_type,
            layer.node.input[1],
            *_constants_added(graph, layer),
            str(_attributes(layer.node)),
        )
        if key not in packed:
            packed[key] = f"{layer.node.input[1]}.packed{len(packed)}"
            model.graph.initializer.append(
                numpy_helper.from_array(pack(layer.weight, layer.bias), packed[key])
            )
        replacements[id(replaced[-1])] = _operator(layer, packed[key])
    nodes = [
        replacements.get(id(node), node)
        for node in graph.nodes
        if id(node) in replacements or id(node) not in dropped
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_unused(model)
    if layers:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _constants_added(graph: _Graph, layer: _Layer) -> Iterator[str]:
    """Names of the constants that the bias comes from."""
    for node in (layer.node, *layer.fused):
        yield from (name for name in node.input if name in graph.initializers)


def _operator(layer: _Layer, packed: str) -> Any:
    node, attributes = layer.node, _attributes(layer.node)
    inputs = [node.input[0], packed, *([layer.residual] if layer.residual else [])]
    geometry: dict[str, Any] = {}
    if node.op_type == "Conv":
        defaults = {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1]}
        geometry = {name: list(attributes.get(name, default)) for name, default in defaults.items()}
    return helper.make_node(
        "SparseConv" if node.op_type == "Conv" else "SparseLinear",
        inputs,
        [layer.output],
        name=node.name,
        domain=DOMAIN,
        low=layer.low,
        high=layer.high,
        **geometry,
    )


def _drop_unused(model: onnx.ModelProto) -> None:
    """Remove initializers and descriptions of tensors that no node has any more."""
    used = {name for node in model.graph.node for name in (*node.input, *node.output)}
    used.update(_names_in_subgraphs(model.graph))
    used.update(value.name for value in model.graph.output)
    for entries in (model.graph.initializer, model.graph.value_info):
        kept = [entry for entry in entries if entry.name in used]
        del entries[:]
        entries.extend(kept)


def _names_in_subgraphs(graph: Any) -> Iterator[str]:
    """Names that the graphs inside of nodes read."""
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from (name for step in inner.node for name in step.input)
                yield from (value.name for value in inner.output)
                yield from _names_in_subgraphs(inner)


def _attributes(node: Any) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _shapes_of_one_image(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Infer the shapes of all tensors for a batch of one image; shapes that are not known are left out."""
    single = onnx.ModelProto()
    single.CopyFrom(model)
    del single.graph.value_info[:]
    for value in (*single.graph.input, *single.graph.output):
        for dim in value.type.tensor_type.shape.dim[:1]:
            dim.dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(single, data_prop=True)
    shapes = {}
    for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes
