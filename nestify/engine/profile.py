"""Measuring the layers of a running model, dense and packed, with ONNX Runtime's profiler."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from nestify.engine.build import sources_digest
from nestify.engine.export import engine_runtime
from nestify.engine.graph import make_sparse
from nestify.engine.layer_times import THREADS, LayerTime, LayerTimes, NetworkTimes, Shape
from nestify.engine.library import cache_folder, load_library
from nestify.engine.model_graph import ModelGraph
from nestify.engine.session import start_session
from nestify.exports.onnx import translate
from nestify.exports.target import ExportFacts
from nestify.files import atomic_file
from nestify.machine import processor_name
from nestify.model.spec import ModelSpec

DENSITIES = (0.1, 0.4)
"""Densities at which packed layers are measured; their time is close to affine in the density."""

BLOCKS = {"avx512": 16, "avx2": 8, "generic": 4}
"""Number of channels that ONNX Runtime computes at once, as many as a vector register holds."""

LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 8, 60, 8.0
PERCENTILE = 10
"""Low, because other work of the machine only makes a call slower."""

_FUSED_AT_MOST = 5
_MULTIPLYING = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


def layer_times(networks: Sequence[nn.Module], spec: ModelSpec, *, packed: bool) -> LayerTimes:
    """Return the times of a model's layers; they are measured once, and kept in the user's cache folder.

    Args:
        networks: networks of the same layers at several widths, the narrowest first and the full one last;
            only copies are used.
        spec: description of the full one.
        packed: whether the layers are measured packed too.

    Raises:
        SetupError: if the engine's library or onnxruntime is missing.
        RecipeError: if a package that exports to ONNX is missing.
        UnsupportedModelError: if the model cannot be exported to ONNX.
    """
    shapes = [[list(parameter.shape) for parameter in network.parameters()] for network in networks]
    identity = [spec.architecture, spec.kwargs, spec.input_size, THREADS, shapes, packed]
    machine = [processor_name(), engine_runtime(), sources_digest()]
    key = hashlib.sha256(json.dumps([identity, machine]).encode()).hexdigest()[:20]
    path = cache_folder() / "layer-times" / f"{key}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or it is damaged
        return _read(path)
    copies = [deepcopy(network).cpu().eval() for network in networks]
    found = measure_layers(copies, spec, packed=packed)
    with suppress(OSError):  # the cache only saves time
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(json.dumps(asdict(found)).encode())
    return found


def _read(path: Path) -> LayerTimes:
    document = json.loads(path.read_text())
    return LayerTimes(
        [
            NetworkTimes(
                {name: LayerTime(**entry) for name, entry in network["layers"].items()},
                float(network["rest"]),
                float(network["packed_rest"]),
                {name: tuple(map(int, shape)) for name, shape in network["shapes"].items()},
            )
            for network in document["networks"]
        ],
        int(document["block"]),
    )


def measure_layers(networks: Sequence[nn.Module], spec: ModelSpec, *, packed: bool) -> LayerTimes:
    """Measure layers inside the running networks, in turns: dense and, if `packed`, with random masks.

    Args:
        networks: as for `layer_times`, in eval mode on the CPU.
        spec: description of the full one.
        packed: as for `layer_times`.

    Raises:
        NestifyError: as `layer_times`.
    """
    facts = ExportFacts(
        spec.architecture, spec.kwargs, spec.num_classes, None, spec.preprocessing, 1, "full", 0.0, {}
    )
    densities = (1.0, *DENSITIES) if packed else (1.0,)
    exported = [_Exported.make(network, facts, spec.maskable, densities) for network in networks]
    with TemporaryDirectory() as folder:
        variants = [variant for each in exported for variant in each.variants]
        profiles = profile(variants, Path(folder), spec.input_size, SECONDS * len(networks))
    numbers = [range(first, first + len(densities)) for first in range(0, len(variants), len(densities))]
    found = [
        _fit(each, [profiles[number] for number in own]) for each, own in zip(exported, numbers, strict=True)
    ]
    return LayerTimes(found, BLOCKS[load_library().isa])


@dataclass(frozen=True)
class _Exported:
    """A network that is measured.

    Attributes:
        graph: the graph of the dense network.
        names: initializer -> weight name.
        packed: initializers of the layers that are packed in the sparse variants.
        variants: the dense network, and the sparse ones.
        shapes: weight name -> its shape.
    """

    graph: ModelGraph
    names: Mapping[str, str]
    packed: frozenset[str]
    variants: Sequence[onnx.ModelProto]
    shapes: Mapping[str, Shape]

    @classmethod
    def make(
        cls, network: nn.Module, facts: ExportFacts, maskable: Sequence[str], densities: Sequence[float]
    ) -> "_Exported":
        """Export a network, in eval mode on the CPU, at several densities, 1 first."""
        model = translate(network, facts, 1, None)
        weights = {name: network.get_parameter(name).detach().numpy() for name in maskable}
        names = weight_names(model, weights)
        variants = [_with_density(model, names, density) for density in densities]
        packed = [make_sparse(variant) for variant in variants][-1]
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        return cls(
            ModelGraph(model), names, frozenset(c.name for c in packed if c.is_sparse), variants, shapes
        )


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


def profile(
    variants: Sequence[onnx.ModelProto], folder: Path, input_size: tuple[int, int, int], seconds: float
) -> list[Profile]:
    """Run models in turns, and return the time of each node of each of them, in the order in which they run.

    Args:
        variants: the models.
        folder: for temporary files.
        input_size: (channels, height, width) of one image.
        seconds: duration, if this allows `LEAST_ROUNDS` or more and `MOST_ROUNDS` or fewer.
    """
    sessions = []
    for number, variant in enumerate(variants):
        path = folder / f"{number}.onnx"
        path.write_bytes(variant.SerializeToString())
        sessions.append(start_session(path, THREADS, profile=folder / str(number)))
    image = np.random.default_rng(0).standard_normal((1, *input_size)).astype(np.float32)
    start, rounds = perf_counter(), 0
    while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and perf_counter() - start < seconds):
        for session in sessions:
            session.run(None, {"images": image})
        rounds += 1
    profiles = [_read_profile(Path(session.end_profiling())) for session in sessions]
    totals: list[list[float]] = [[] for _ in sessions]
    for _ in range(rounds):
        for session, times in zip(sessions, totals, strict=True):
            start = process_time()
            session.run(None, {"images": image})
            times.append(process_time() - start)
    return [
        without_overhead(found, float(np.percentile(times, PERCENTILE)))
        for found, times in zip(profiles, totals, strict=True)
    ]


def without_overhead(found: Profile, total: float) -> Profile:
    """Take the time that profiling adds to each node off, so that the sum is that of a run without it.

    Args:
        found: the profile.
        total: seconds of a run that is not profiled.
    """
    each = max(0.0, sum(seconds for _, seconds in found.values()) - total) / max(1, len(found))
    return {name: (operator, max(0.0, seconds - each)) for name, (operator, seconds) in found.items()}


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


def _fit(exported: _Exported, profiles: Sequence[Profile]) -> NetworkTimes:
    """Fit the time of each layer of a network to the profiles of its variants."""
    graph, names = exported.graph, exported.names
    layers = {node.name: node for node in graph.nodes if len(node.input) > 1 and node.input[1] in names}
    dense, after = _dense_seconds(graph, layers, profiles[0])
    sparse: dict[str, list[float]] = defaultdict(list)  # by weight, at each density
    for variant, found in zip(exported.variants[1:], profiles[1:], strict=True):
        sums: dict[str, float] = defaultdict(float)
        for node in variant.graph.node:
            if node.domain and node.name in layers and node.name in found:
                sums[names[layers[node.name].input[1]]] += found[node.name][1]
        for name, seconds in sums.items():
            sparse[name].append(seconds)
    low, high = DENSITIES
    by_weight: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for node_name, node in layers.items():
        own, following = by_weight[names[node.input[1]]]
        by_weight[names[node.input[1]]] = own + dense[node_name], following + after[node_name]
    complete = {names[name] for name in exported.packed}
    times = {}
    for name, (seconds, following) in by_weight.items():
        times[name] = LayerTime(seconds, after=following)
        if name in complete and len(sparse[name]) == len(DENSITIES):
            slope = max(0.0, (sparse[name][1] - sparse[name][0]) / (high - low))
            fixed = max(0.0, sparse[name][0] - slope * low)
            times[name] = LayerTime(seconds, fixed, slope, following)
    total, packed_total = (
        sum(seconds for _, seconds in found.values()) for found in (profiles[0], profiles[-1])
    )
    return NetworkTimes(
        times,
        max(0.0, total - sum(seconds for seconds, _ in by_weight.values())),
        max(0.0, packed_total - sum(layer.seconds(high) for layer in times.values())),
        exported.shapes,
    )


def _dense_seconds(
    graph: ModelGraph, layers: Mapping[str, Any], found: Profile
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the time of each layer in ONNX Runtime's own operators, and that of what runs after it.

    ONNX Runtime names an operator that it made from several nodes after one of them or its output, with the
    fusion's name in front or behind. The time of operators that are not recognised is divided among the
    layers that were not found.

    Args:
        graph: the graph of the dense model.
        layers: the layers' nodes, by name.
        found: profile of the dense model.
    """
    seconds: dict[str, float] = {}
    owners: dict[str, str] = {}
    left = {name: time for name, (operator, time) in found.items() if operator in _MULTIPLYING}
    keys = {key.partition("/")[0].removeprefix("fused ").removesuffix("_nchwc"): key for key in left}
    for name, node in layers.items():
        for alias in _aliases(graph, node):
            key = keys.get(alias)
            if key in left:
                seconds[name], owners[key] = left.pop(key), name
                break
    missing = [name for name in layers if name not in seconds]
    shares = {name: _size(graph, layers[name]) for name in missing}
    for name in missing:
        seconds[name] = sum(left.values()) * shares[name] / sum(shares.values())
    after, last = dict.fromkeys(layers, 0.0), None
    for name, (_, time) in found.items():
        if name in owners:
            last = owners[name]
        elif last is not None and not (missing and name in left):
            after[last] += time
    return seconds, after


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
