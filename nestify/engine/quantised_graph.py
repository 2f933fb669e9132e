"""Look-ups in an ONNX graph whose tensors are quantised, as QuantizeLinear and DequantizeLinear nodes say."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from nestify.engine.model_graph import ModelGraph


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


class QuantisedGraph(ModelGraph):
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

    def float_constant(self, name: str) -> NDArray[np.float32] | None:
        """Return a constant of float32 that is stored so, or in 8 bits with one scale; None for others."""
        source = self.producer(name, "DequantizeLinear")
        if source is None:
            return self.constant(name)
        number, stored = self.activations(source, source.input[0]), self.constant(source.input[0])
        if number is None or stored is None:
            return None
        return np.asarray((stored.astype(np.int32) - number.zero) * number.scale, np.float32)

    def is_pooled(self, name: str) -> bool:
        """Return whether a MaxPool reads a tensor, dequantised."""
        readers = [node for source in self.consumers[name] for node in self.consumers[source.output[0]]]
        return any(node.op_type == "MaxPool" for node in readers)
