"""Look-ups in an ONNX graph: constants, consumers, and shapes for one image."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

LEAST_BYTES = 4096
"""Smaller constants may be shapes, which the shapes of other tensors are computed from."""


class ModelGraph:
    """The graph of a model, for look-ups; later changes of the model are not seen.

    Args:
        model: the model.
        data: values of the initializers that the model has without their data, by name.

    Attributes:
        nodes: the nodes, in the order in which they run.
        initializers: constants, by name.
        outputs: names of the graph's outputs.
        consumers: by tensor, the nodes that read it.
        inner: names of tensors that graphs inside of nodes read.
    """

    def __init__(self, model: onnx.ModelProto, data: Mapping[str, NDArray[Any]] | None = None) -> None:
        self._data = data or {}
        self.nodes = list(model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self.consumers = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.consumers[name].append(node)
        self.inner = set(names_in_subgraphs(model.graph))
        self._shapes = _shapes_of_one_image(model)

    def constant(self, name: str) -> NDArray[Any] | None:
        """Return the value of an initializer; None for anything else."""
        if name in self._data:
            return self._data[name]
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


def attributes(node: Any) -> dict[str, Any]:
    """Return a node's attributes by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def names_in_subgraphs(graph: Any) -> Iterator[str]:
    """Names that the graphs inside of nodes read."""
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from (name for step in inner.node for name in step.input)
                yield from (value.name for value in inner.output)
                yield from names_in_subgraphs(inner)


def _shapes_of_one_image(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Infer the shapes of all tensors for a batch of one image; shapes that are not known are left out."""
    single = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    single.functions.extend(model.functions)
    for field in ("node", "input", "output"):
        getattr(single.graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:  # without weights, which are copied twice otherwise
        single.graph.initializer.append(
            tensor
            if len(tensor.raw_data) < LEAST_BYTES
            else onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        )
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
