"""Rewriting an ONNX model: layers whose weight is sparse become the engine's operators."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from nestify.engine.model_graph import ModelGraph, attributes, names_in_subgraphs
from nestify.engine.pack import pack
from nestify.engine.plan import Choice, SparseLayer, plan_layers
from nestify.exports.target import PackedType

DOMAIN = "nestify"
METADATA_KEY = "nestify_engine"
FORMAT = 1


def make_sparse(
    model: onnx.ModelProto,
    dtype: PackedType = PackedType.float32,
    constants: Mapping[str, NDArray[Any]] | None = None,
) -> list[Choice]:
    """Replace, in place, layers that the engine runs faster than ONNX Runtime.

    A layer is replaced if at most 45 % of its weights are not zero, and it has at least half a million dense
    MACs and four positions per image; depthwise convolutions are not. Biases, residual additions, Relu and
    Clip that follow it are fused. The choices are stored in the model's metadata.

    Args:
        model: a model with float32 weights; its batch size may be open.
        dtype: type in which packed weights are stored; biases and dense layers stay float32.
        constants: values of initializers that the model has without their data, by name; those of dense
            layers are still missing afterwards.

    Returns:
        One entry per layer with a constant weight.

    Raises:
        UnsupportedModelError: if a layer cannot be packed.
        SetupError: if the engine's library is missing.
    """
    graph = ModelGraph(model, constants)
    layers, choices = plan_layers(graph)
    _rewrite(model, graph, layers, dtype)
    document = {"format": FORMAT, "layers": [vars(choice) for choice in choices]}
    helper.set_model_props(
        model,
        {**{entry.key: entry.value for entry in model.metadata_props}, METADATA_KEY: json.dumps(document)},
    )
    return choices


def _rewrite(
    model: onnx.ModelProto, graph: ModelGraph, layers: Sequence[SparseLayer], dtype: PackedType
) -> None:
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
            str(attributes(layer.node)),
        )
        if key not in packed:
            packed[key] = f"{layer.node.input[1]}.packed{len(packed)}"
            model.graph.initializer.append(
                numpy_helper.from_array(pack(layer.weight, layer.bias, dtype=dtype), packed[key])
            )
        replacements[id(replaced[-1])] = _operator(layer, packed[key])
    nodes = [
        replacements.get(id(node), node)
        for node in graph.nodes
        if id(node) in replacements or id(node) not in dropped
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_unused(model)
    if layers:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _constants_added(graph: ModelGraph, layer: SparseLayer) -> Iterator[str]:
    """Names of the constants that the bias comes from."""
    for node in (layer.node, *layer.fused):
        yield from (name for name in node.input if name in graph.initializers)


def _operator(layer: SparseLayer, packed: str) -> Any:
    node, options = layer.node, attributes(layer.node)
    inputs = [node.input[0], packed, *([layer.residual] if layer.residual else [])]
    geometry: dict[str, Any] = {}
    if node.op_type == "Conv":
        defaults = {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1]}
        geometry = {name: list(options.get(name, default)) for name, default in defaults.items()}
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


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove initializers and descriptions of tensors that no node has any more."""
    used = {name for node in model.graph.node for name in (*node.input, *node.output)}
    used.update(names_in_subgraphs(model.graph))
    used.update(value.name for value in model.graph.output)
    for entries in (model.graph.initializer, model.graph.value_info):
        kept = [entry for entry in entries if entry.name in used]
        del entries[:]
        entries.extend(kept)
