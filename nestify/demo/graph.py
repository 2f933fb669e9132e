"""A level as an ONNX graph without its weights, which the page takes from the nested file's bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nestify.errors import NestifyError, OutputError, UnsupportedModelError, foreign_code
from nestify.exports.draft import FLOAT32_TOLERANCE, Probe, Runner, probes, prove, quiet
from nestify.exports.onnx import DEFAULT_OPSET, import_packages
from nestify.exports.pt2 import capture
from nestify.exports.target import ExportFacts
from nestify.file.loading import load_level
from nestify.file.reader import NestedFile

WEIGHTS = "weights"
"""Name under which a graph expects its weights."""

ALIGNMENT = 64
"""Tensors of the weights begin at multiples of this many bytes."""

SMALLEST = 64
"""Bytes of a tensor from which on it is taken from the nested file; smaller ones stay in the graph."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor of a level, and where it is in the level's weights.

    Attributes:
        name: its name in the nested file.
        private: whether it belongs to the level alone.
        offset: its first byte.
    """

    name: str
    private: bool
    offset: int


@dataclass(frozen=True)
class LevelGraph:
    """A level for the page.

    Attributes:
        model: ONNX model of batches of one picture, as bytes; its weights are external data.
        tensors: the tensors of its weights, in order.
        size: bytes of its weights.
    """

    model: bytes
    tensors: tuple[PlacedTensor, ...]
    size: int


def level_graph(file: NestedFile, number: int) -> LevelGraph:
    """Return a level as a graph, after its logits have been compared with the level's.

    Args:
        file: the nested file.
        number: number of the level.

    Raises:
        RecipeError: if a package is missing.
        BadFileError: if the file is damaged.
        UnsupportedModelError: if the level cannot be translated to ONNX.
        OutputError: if the graph's logits differ from the level's.
    """
    packages = import_packages()
    facts = ExportFacts.for_level(file.manifest, number)
    plain = load_level(file, number)
    expected = probes(plain, facts, 1)

    def describe(reason: str) -> NestifyError:
        return UnsupportedModelError(
            f"{facts.title} cannot be translated to ONNX ({reason}), so it cannot run in a browser"
        )

    # Not optimised, because folding batch norm into convolutions would change the weights.
    with foreign_code(describe), quiet(), torch.no_grad():
        program = torch.onnx.export(
            capture(plain, facts, 1),
            dynamo=True,
            opset_version=DEFAULT_OPSET,
            input_names=["images"],
            output_names=["logits"],
            optimize=False,
            verbose=False,
        )
        assert program is not None
        import_module("onnx_ir.passes.common").ClearMetadataAndDocStringPass()(program.model)
        model: Any = program.model_proto
    stored = {_key(values): (name, private) for name, private, values in _level_tensors(file, number)}
    placed, weights = _take_out(model, stored)
    graph = LevelGraph(model.SerializeToString(), tuple(placed), len(weights))
    _check(packages["onnxruntime"], graph, weights, facts, expected)
    return graph


def _level_tensors(file: NestedFile, number: int) -> Iterator[tuple[str, bool, Floats]]:
    """Yield name, whether it is private, and values of each floating-point tensor as the level has it."""
    state = file.state(number)
    for name, tensor in state.shared.items():
        if not tensor.is_floating_point():
            continue
        values = tensor.float().numpy()
        for dim, levels in state.axes.get(name, {}).items():
            values = values.compress(levels.numpy() <= number, axis=dim)
        yield name, False, values
    for name, tensor in state.private[number - 1].items():
        if tensor.is_floating_point():
            yield name, True, tensor.float().numpy()


def _key(values: NDArray[Any]) -> tuple[tuple[int, ...], str, bytes]:
    return values.shape, str(values.dtype), values.tobytes()


def _take_out(
    model: Any, stored: dict[tuple[tuple[int, ...], str, bytes], tuple[str, bool]]
) -> tuple[list[PlacedTensor], bytes]:
    """Take the tensors that the nested file holds out of a model; the others stay in it.

    Returns:
        Their places, and the weights.
    """
    onnx = import_module("onnx")
    placed: list[PlacedTensor] = []
    weights = bytearray()
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        found = stored.get(_key(values))
        if found is None or values.nbytes < SMALLEST:
            continue
        weights += bytes(-len(weights) % ALIGNMENT)
        placed.append(PlacedTensor(*found, offset=len(weights)))
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        place = {"location": WEIGHTS, "offset": len(weights), "length": values.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        weights += values.tobytes()
    return placed, bytes(weights)


def _check(
    runtime: Any, graph: LevelGraph, weights: bytes, facts: ExportFacts, expected: Sequence[Probe]
) -> None:
    """Run a graph as the page does, and compare its logits with the level's.

    Raises:
        OutputError: if they differ.
    """

    def reopen(_: Path) -> Runner:
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
        session = runtime.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    try:
        prove(reopen, Path(), expected, FLOAT32_TOLERANCE, facts.title)
    except OutputError as error:
        raise OutputError(
            f"{facts.title} gives other logits in ONNX Runtime than in torch, so no page was written; see "
            "what nestify export --format onnx says about it"
        ) from error
