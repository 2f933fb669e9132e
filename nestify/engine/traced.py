"""Traced graphs without weights, cached, so that a level is packed without being traced again."""

import hashlib
import json
from collections.abc import Mapping, MutableMapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from numpy.typing import NDArray

from nestify.engine.model_graph import LEAST_BYTES
from nestify.errors import UnsupportedModelError
from nestify.exports.onnx import optimise, serialise
from nestify.exports.target import ExportFacts
from nestify.file.reader import NestedFile
from nestify.files import atomic_file
from nestify.version import __version__

Array = NDArray[Any]

WEIGHTS = "nestify_weights"
"""Metadata entry of a cached graph: names of the weights, which it does not hold."""

MADE_WITH = ("torch", "timm", "onnx", "onnx-ir", "onnxscript")
"""Packages whose version may change a graph."""


def traced_level(file: NestedFile, level: int, folder: Path) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Return a level as an ONNX model that is optimised but lacks its large constants, and these by name.

    The graph is traced when the first level of an architecture is asked for, and kept in the folder. Filled
    with the constants, the model is what `nestify.exports.onnx.translate` returns, but for the names that
    the optimiser generates.

    Args:
        file: a nested file whose levels have all channels and blocks.
        level: number of the level.
        folder: where graphs are kept; it exists.

    Raises:
        UnsupportedModelError: if the model cannot be traced, or a level lacks a weight that its graph needs.
        BadFileError: if the file is damaged.
        OutputError: if the graph cannot be written.
    """
    facts = ExportFacts.for_level(file.manifest, level)
    path = folder / f"{_identity(facts)}.graph.onnx"
    graph = _open(path) or _trace(file, level, facts, path)
    _fill(graph, file.level_tensors(level), facts)
    optimise(graph, facts)
    constants: dict[str, Array] = {}
    for name, value in graph.graph.initializers.items():
        if (tensor := value.const_value) is not None and tensor.nbytes >= LEAST_BYTES:
            constants[name] = tensor.numpy()
            _drop_data(value)
    return serialise(graph, facts), constants


def fill_constants(model: onnx.ModelProto, constants: MutableMapping[str, Array]) -> None:
    """Store constants in the model that lacks them; the mapping is empty afterwards.

    Args:
        model: a model whose initializers may lack their data.
        constants: the data, by name; entries that the model does not use are dropped.
    """
    for tensor in model.graph.initializer:
        if tensor.name in constants:
            tensor.raw_data = constants.pop(tensor.name).tobytes()
    constants.clear()


def _identity(facts: ExportFacts) -> str:
    """Return a hash of what a graph depends on."""
    made_with = [__version__, *(version(name) for name in MADE_WITH)]
    about = [facts.architecture, dict(facts.kwargs), facts.num_classes, facts.input_size]
    return hashlib.sha256(json.dumps([about, made_with], sort_keys=True).encode()).hexdigest()[:20]


def _trace(file: NestedFile, level: int, facts: ExportFacts, path: Path) -> Any:
    """Trace the network of a level, whose weights are not read, write its graph and return it."""
    from nestify.exports.onnx import DEFAULT_OPSET, trace
    from nestify.file.loading import build_network

    network = build_network(file, level)[0].eval()
    weights = network.state_dict()
    graph = trace(network, facts, None, DEFAULT_OPSET)
    names = [name for name in graph.graph.initializers if name in weights]
    graph.metadata_props[WEIGHTS] = json.dumps(names)
    for name in names:
        _drop_data(graph.graph.initializers[name])
    with atomic_file(path) as output:
        output.write(onnx_ir.to_proto(graph).SerializeToString())
    return graph


def _drop_data(value: Any) -> None:
    """Replace a constant by one of the same name, type and shape that is stored without data."""
    tensor = value.const_value
    bare = onnx.TensorProto(name=value.name, data_type=int(tensor.dtype), dims=list(tensor.shape))
    value.const_value = onnx_ir.serde.TensorProtoTensor(bare)


def _open(path: Path) -> Any | None:
    """Return a cached graph; None if there is none, or it is damaged."""
    try:
        return onnx_ir.from_proto(onnx.load(path))
    except Exception:  # whatever the parsers raise
        return None


def _fill(graph: Any, tensors: Mapping[str, torch.Tensor], facts: ExportFacts) -> None:
    """Give the weights of a graph their values, in the types that the graph has."""
    for name in json.loads(graph.metadata_props.pop(WEIGHTS)):
        value = graph.graph.initializers[name]
        shape, dtype = tuple(value.const_value.shape), value.const_value.dtype.numpy()
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise UnsupportedModelError(
                f"{facts.title} has no tensor {name!r} of shape {shape}; export it with `nestify export`"
            )
        array = tensors[name].detach()
        array = array.float() if array.dtype == torch.bfloat16 else array
        value.const_value = onnx_ir.tensor(array.numpy().astype(dtype, copy=False), name=name)
