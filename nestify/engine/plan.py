"""Which layers of an ONNX model become sparse operators, and what is fused into each."""

from dataclasses import dataclass, field
from math import inf, prod
from typing import Any

import numpy as np

from nestify.engine.model_graph import ModelGraph, attributes
from nestify.engine.pack import HIGHEST_DENSITY, Floats, SparseWeight

LEAST_MACS = 500_000
LEAST_POSITIONS = 4


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
class SparseLayer:
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


def plan_layers(graph: ModelGraph) -> tuple[list[SparseLayer], list[Choice]]:
    """Choose the layers that become sparse, and the nodes that are fused into each.

    Returns:
        The layers that become sparse, and what was decided about each layer with a constant weight.
    """
    layers: list[SparseLayer] = []
    choices: list[Choice] = []
    taken: set[int] = set()  # ids of nodes that are fused into a layer
    for node in graph.nodes:
        found = _read_layer(graph, node)
        if found is None:
            continue
        shape = graph.shape(node.output[0])
        positions = None if shape is None else prod(shape[2:] if node.op_type == "Conv" else shape[:-1])
        macs = None if positions is None else positions * found.weight.size
        density = np.count_nonzero(found.weight) / max(1, found.weight.size)
        reason = found.unsupported or _why_dense(density, macs, positions)
        choices.append(Choice(node.input[1], node.op_type, round(density, 6), macs, reason))
        if not reason:
            layer = SparseLayer(node, SparseWeight.from_dense(found.weight, found.groups), found.bias)
            _fuse(graph, layer, taken)
            taken.update(id(fused) for fused in layer.fused)
            layers.append(layer)
    return layers, choices


def _why_dense(density: float, macs: int | None, positions: int | None) -> str:
    if density > HIGHEST_DENSITY:
        return "it is not sparse enough"
    if macs is None or positions is None:
        return "the size of its output is not known"
    if positions < LEAST_POSITIONS:
        return "it has too few positions"
    return "it is too small" if macs < LEAST_MACS else ""


@dataclass(frozen=True)
class _Dense:
    """A layer as the model has it.

    Attributes:
        weight: (outputs, inputs per group, kernel height, kernel width) or (outputs, inputs).
        bias: (outputs,), or None.
        groups: number of groups.
        unsupported: why the engine cannot run it, or never faster; empty if it can.
    """

    weight: Floats
    bias: Floats | None
    groups: int = 1
    unsupported: str = ""


def _read_layer(graph: ModelGraph, node: Any) -> _Dense | None:
    """Return a layer whose weight is a float32 constant; None for any other node."""
    if node.domain or node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    weight, options = graph.constant(node.input[1]), attributes(node)
    if weight is None or weight.dtype != np.float32 or weight.ndim != (4 if node.op_type == "Conv" else 2):
        return None
    if node.op_type == "MatMul":
        return _Dense(weight.T, None)
    has_bias = len(node.input) > 2 and bool(node.input[2])
    bias = graph.constant(node.input[2]) if has_bias else None
    unsupported = "its bias is not a constant" if has_bias and bias is None else ""
    if node.op_type == "Conv":
        if options.get("auto_pad", b"NOTSET") != b"NOTSET":
            unsupported = "it uses auto_pad"
        groups = options.get("group", 1)
        if groups > 1 and weight.shape[1] == 1:  # measured 2 to 5 times slower than ONNX Runtime's own
            unsupported = unsupported or "it is depthwise"
        return _Dense(weight, bias, groups, unsupported)
    if options.get("transA", 0):
        unsupported = "its input is transposed"
    rows = (weight if options.get("transB", 0) else weight.T) * np.float32(options.get("alpha", 1.0))
    if bias is not None:
        if bias.size not in (1, len(rows)) or (bias.ndim > 1 and bias.shape[0] != 1):
            unsupported = "its bias differs between rows"
        else:
            bias = np.broadcast_to(bias.reshape(-1) * np.float32(options.get("beta", 1.0)), (len(rows),))
    return _Dense(rows, bias, 1, unsupported)


def _fuse(graph: ModelGraph, layer: SparseLayer, taken: set[int]) -> None:
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


def _take_bias(graph: ModelGraph, layer: SparseLayer, node: Any, outputs: int) -> bool:
    """A bias that is added after a MatMul."""
    if node.op_type != "Add" or layer.node.op_type != "MatMul":
        return False
    bias = graph.constant(_other_input(node, layer.output))
    if bias is None or bias.dtype != np.float32 or bias.shape != (outputs,):
        return False
    layer.bias = bias
    return True


def _take_residual(graph: ModelGraph, layer: SparseLayer, node: Any, outputs: int) -> bool:
    """A tensor of the same shape that is added; where shapes differ, it would have to be broadcast."""
    other = _other_input(node, layer.output) if node.op_type == "Add" else ""
    shape = graph.shape(layer.output)
    if not other or other in graph.initializers or shape is None or graph.shape(other) != shape:
        return False
    layer.residual = other
    return True


def _take_clamp(graph: ModelGraph, layer: SparseLayer, node: Any, outputs: int) -> bool:
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
