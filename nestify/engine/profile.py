"""Measuring the layers of a running model, dense and packed, with ONNX Runtime's profiler."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from nestify.engine.build import sources_digest
from nestify.engine.export import engine_runtime
from nestify.engine.graph import make_sparse
from nestify.engine.layer_times import THREADS, LayerTime, LayerTimes
from nestify.engine.library import cache_folder
from nestify.engine.model_graph import ModelGraph
from nestify.engine.session import start_session
from nestify.exports.onnx import translate
from nestify.exports.target import ExportFacts
from nestify.files import atomic_file
from nestify.machine import processor_name
from nestify.model.spec import ModelSpec

DENSITIES = (0.1, 0.4)
"""Densities at which packed layers are measured; their time is close to affine in the density."""

LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 8, 60, 8.0
PERCENTILE = 10
"""Low, because other work of the machine only makes a call slower."""

_FUSED_AT_MOST = 5
_MULTIPLYING = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


def layer_times(network: nn.Module, spec: ModelSpec) -> LayerTimes:
    """Return the times of a model's layers; they are measured once, and kept in the user's cache folder.

    Args:
        network: a timm model; only a copy is used.
        spec: its description.

    Raises:
        SetupError: if the engine's library or onnxruntime is missing.
        RecipeError: if a package that exports to ONNX is missing.
        UnsupportedModelError: if the model cannot be exported to ONNX.
    """
    identity = [spec.architecture, spec.kwargs, spec.input_size, THREADS]
    machine = [processor_name(), engine_runtime(), sources_digest()]
    key = hashlib.sha256(json.dumps([identity, machine]).encode()).hexdigest()[:20]
    path = cache_folder() / "layer-times" / f"{key}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or it is damaged
        return _read(path)
    found = measure_layers(deepcopy(network).cpu().eval(), spec)
    with suppress(OSError):  # the cache only saves time
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(json.dumps(asdict(found)).encode())
    return found


def _read(path: Path) -> LayerTimes:
    document = json.loads(path.read_text())
    layers = {name: LayerTime(**entry) for name, entry in document["layers"].items()}
    return LayerTimes(layers, float(document["rest"]), float(document["packed_rest"]))


def measure_layers(plain: nn.Module, spec: ModelSpec) -> LayerTimes:
    """Measure the layers of a model inside the running model, dense and with random masks, in turns.

    Args:
        plain: a timm model in eval mode on the CPU.
        spec: its description.

    Raises:
        NestifyError: as `layer_times`.
    """
    facts = ExportFacts(
        spec.architecture, spec.kwargs, spec.num_classes, None, spec.preprocessing, 1, "full", 0.0, {}
    )
    model = translate(plain, facts, 1, None)
    names = weight_names(model, {name: plain.get_parameter(name).detach().numpy() for name in spec.maskable})
    variants = [_with_density(model, names, density) for density in (1.0, *DENSITIES)]
    packed = [make_sparse(variant) for variant in variants][-1]
    with TemporaryDirectory() as folder:
        profiles = profile(variants, Path(folder), spec.input_size)
    return _fit(ModelGraph(model), names, {c.name for c in packed if c.is_sparse}, variants, profiles)


def weight_names(model: onnx.ModelProto, weights: Mapping[str, Any]) -> dict[str, str]:
    """Return which weight each constant of a model is: initializer -> weight name.

    The export transposes linear weights, and may rename weights and scale rows by a batch norm. So those of
    other names are found by where each row has its largest and smallest value, whatever its sign.

    Args:
        model: a dense model.
        weights: name -> float32 array.
    """
    by_rows = {_rows(weight): name for name, weight in weights.items()}
    found = {}
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            found[tensor.name] = tensor.name
        elif len(tensor.dims) >= 2:
            array = numpy_helper.to_array(tensor)
            name = by_rows.get(_rows(array)) or by_rows.get(_rows(array.T))
            if name is not None:
                found[tensor.name] = name
    return found


def _rows(weight: NDArray[Any]) -> tuple[tuple[int, ...], bytes]:
    rows = np.abs(weight.reshape(len(weight), -1))
    return weight.shape, np.stack([rows.argmax(1), rows.argmin(1)]).tobytes()


def _with_density(model: onnx.ModelProto, names: Mapping[str, str], density: float) -> onnx.ModelProto:
    """Return a copy of a model with random weights of one density; times do not depend on the values.

    An untrained model may have layers of zeros, which would be packed at any density.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    generator = np.random.default_rng(0)
    for tensor in changed.graph.initializer:
        if tensor.name in names:
            shape = tuple(tensor.dims)
            values = generator.standard_normal(shape) * (np.prod(shape[1:]) * density) ** -0.5
            kept = values * (generator.random(shape) < density)
            tensor.CopyFrom(numpy_helper.from_array(kept.astype(np.float32), tensor.name))
    return changed


Profile = Mapping[str, tuple[str, float]]
"""Name of a node, as ONNX Runtime has it -> its operator, and seconds for one image."""


def profile(variants: list[onnx.ModelProto], folder: Path, input_size: tuple[int, int, int]) -> list[Profile]:
    """Run models in turns, and return the time of each node of each of them.

    Args:
        variants: the models.
        folder: for temporary files.
        input_size: (channels, height, width) of one image.
    """
    sessions = []
    for number, variant in enumerate(variants):
        path = folder / f"{number}.onnx"
        path.write_bytes(variant.SerializeToString())
        sessions.append(start_session(path, THREADS, profile=folder / str(number)))
    image = np.random.default_rng(0).standard_normal((1, *input_size)).astype(np.float32)
    start, rounds = perf_counter(), 0
    while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and perf_counter() - start < SECONDS):
        for session in sessions:
            session.run(None, {"images": image})
        rounds += 1
    return [_read_profile(Path(session.end_profiling())) for session in sessions]


def _read_profile(path: Path) -> Profile:
    microseconds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for event in json.loads(path.read_text()):
        name = event["name"]
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            key = name.removesuffix("_kernel_time"), event["args"]["op_name"]
            microseconds[key].append(event["dur"])
    return {
        name: (operator, float(np.percentile(times, PERCENTILE)) / 1e6)
        for (name, operator), times in microseconds.items()
    }


def _fit(
    graph: ModelGraph,
    names: Mapping[str, str],
    packed: set[str],
    variants: list[onnx.ModelProto],
    profiles: list[Profile],
) -> LayerTimes:
    """Fit the time of each layer to the profiles.

    Args:
        graph: the graph of the dense model.
        names: initializer -> weight name.
        packed: initializers of the layers that are packed in the sparse variants.
        variants: the dense model, and the sparse ones.
        profiles: profiles of the variants.
    """
    layers = {node.name: node for node in graph.nodes if len(node.input) > 1 and node.input[1] in names}
    dense = _dense_seconds(graph, layers, profiles[0])
    sparse: dict[str, list[float]] = defaultdict(list)  # by weight, at each density
    for variant, found in zip(variants[1:], profiles[1:], strict=True):
        sums: dict[str, float] = defaultdict(float)
        for node in variant.graph.node:
            if node.domain and node.name in layers and node.name in found:
                sums[names[layers[node.name].input[1]]] += found[node.name][1]
        for name, seconds in sums.items():
            sparse[name].append(seconds)
    low, high = DENSITIES
    by_weight: dict[str, float] = defaultdict(float)
    for node_name, node in layers.items():
        by_weight[names[node.input[1]]] += dense[node_name]
    complete = {names[name] for name in packed}
    times = {}
    for name, seconds in by_weight.items():
        times[name] = LayerTime(seconds)
        if name in complete and len(sparse[name]) == len(DENSITIES):
            slope = max(0.0, (sparse[name][1] - sparse[name][0]) / (high - low))
            times[name] = LayerTime(seconds, max(0.0, sparse[name][0] - slope * low), slope)
    total, packed_total = (
        sum(seconds for _, seconds in found.values()) for found in (profiles[0], profiles[-1])
    )
    return LayerTimes(
        times,
        max(0.0, total - sum(by_weight.values())),
        max(0.0, packed_total - sum(layer.seconds(high) for layer in times.values())),
    )


def _dense_seconds(graph: ModelGraph, layers: Mapping[str, Any], found: Profile) -> dict[str, float]:
    """Return the time of each layer in ONNX Runtime's own operators, by the name of its node.

    ONNX Runtime names an operator that it made from several nodes after one of them or its output. The time
    of operators that are not recognised is divided among the layers that were not found.
    """
    seconds: dict[str, float] = {}
    left = {name: time for name, (operator, time) in found.items() if operator in _MULTIPLYING}
    for name, node in layers.items():
        for alias in _aliases(graph, node):
            key = next((key for key in (alias, f"{alias}_nchwc", f"fused {alias}") if key in left), None)
            if key is not None:
                seconds[name] = left.pop(key)
                break
    missing = [name for name in layers if name not in seconds]
    sizes = {name: _size(graph, layers[name]) for name in missing}
    for name in missing:
        seconds[name] = sum(left.values()) * sizes[name] / sum(sizes.values())
    return seconds


def _aliases(graph: ModelGraph, node: Any) -> Iterator[str]:
    """Yield the names that ONNX Runtime may give a layer that it fuses with what follows."""
    for _ in range(_FUSED_AT_MOST):
        yield from (node.name, *node.output)
        following = graph.only_consumer(node.output[0])
        if following is None or following.op_type in ("Conv", "Gemm", "MatMul"):
            return
        node = following


def _size(graph: ModelGraph, node: Any) -> float:
    """Return a number in proportion to the MACs of a layer."""
    shape, dims = graph.shape(node.output[0]), graph.initializers[node.input[1]].dims
    positions = np.prod(shape[2:] if node.op_type == "Conv" else shape[:-1]) if shape else 1
    return float(positions * np.prod(dims))
