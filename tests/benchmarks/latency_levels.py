"""Time of sparse levels by score: predicted from the layer times, and measured on the sparse engine.

    OMP_NUM_THREADS=1 python tests/benchmarks/latency_levels.py tf_efficientnet_lite0 CHECKPOINT.safetensors

Each score keeps the same share of the weights, and then what the same predicted latency allows. All levels of
one table run in turns with the dense model, one image, one thread; the ratio is the median of the rounds.
"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import onnx
import timm
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor

from nestify.engine.graph import make_sparse
from nestify.engine.layer_times import LayerTimes
from nestify.engine.profile import layer_times, weight_names
from nestify.engine.session import Session
from nestify.evaluation.bench import Effort, measure
from nestify.exports.onnx import translate
from nestify.exports.target import ExportFacts
from nestify.model.spec import ModelSpec, describe_model
from nestify.recipe.level_options import Score
from nestify.recipe.levels import Level
from nestify.schedule.costs import MacCount, count_macs, effective_macs
from nestify.schedule.weights import select_entry_levels

SCORES: tuple[Score, ...] = ("uniform", "lamp", "per_mac")
SPARSITIES, SHARES = (0.8, 0.9), (0.75, 0.6)
Masks = Mapping[str, Tensor]


def choose(weights: Masks, score: Score, sparsity: float, count: MacCount) -> Masks:
    """Return the masks of a level."""
    levels = [Level("core", sparsity), Level("full", 0.0)]
    return {
        n: e <= 1
        for n, e in select_entry_levels(weights, levels, score, None, count.by_weight).tensors.items()
    }


def densities(masks: Masks) -> dict[str, float]:
    """Return the density of each weight."""
    return {name: float(mask.float().mean()) for name, mask in masks.items()}


def solve(weights: Masks, score: Score, share: float, count: MacCount, times: LayerTimes) -> float:
    """Return the sparsity with a predicted latency, to 0.1 %."""
    low, high = 0.0, 0.999
    while high - low > 0.001:
        middle = (low + high) / 2
        slow = times.share(densities(choose(weights, score, middle, count))) > share
        low, high = (middle, high) if slow else (low, middle)
    return high


def with_masks(model: onnx.ModelProto, names: Mapping[str, str], masks: Masks) -> onnx.ModelProto:
    """Return a packed copy of a model with masked weights; linear weights are transposed in the model."""
    masked = onnx.ModelProto()
    masked.CopyFrom(model)
    for tensor in masked.graph.initializer:
        if (name := names.get(tensor.name)) in masks:
            array, mask = numpy_helper.to_array(tensor), masks[name].numpy()
            kept = array * (mask if mask.shape == array.shape else mask.T)
            tensor.CopyFrom(numpy_helper.from_array(kept.astype(np.float32), tensor.name))
    make_sparse(masked)
    return masked


def main(architecture: str, checkpoint: str | None = None, seconds: float = 10.0) -> None:
    """Print a table for each sparsity and each predicted latency."""
    network = timm.create_model(architecture).eval()
    if checkpoint:
        network.load_state_dict(load_file(checkpoint))
    spec: ModelSpec = describe_model(network)
    count, times = count_macs(network, spec.input_size), layer_times([network], spec, packed=True)
    weights = {
        name: network.get_parameter(name).detach() for name in spec.maskable if name not in spec.depthwise
    }
    facts = ExportFacts(
        spec.architecture, spec.kwargs, spec.num_classes, None, spec.preprocessing, 1, "full", 0.0, {}
    )
    model = translate(network, facts, 1, None)
    every = {name: network.get_parameter(name).detach().numpy() for name in spec.maskable}
    names = weight_names(model, every)
    image = np.random.default_rng(0).standard_normal((1, *spec.input_size)).astype(np.float32)
    goals = [(f"sparsity {s:g}", s, None) for s in SPARSITIES] + [(f"latency {s:g}", None, s) for s in SHARES]
    print(f"{'level':14} {'score':8} {'kept':>6} {'MACs':>6} {'predicted':>9} {'measured':>8} quartiles")
    with TemporaryDirectory() as folder:
        for title, sparsity, share in goals:
            levels = {}
            for score in SCORES:
                at = sparsity if sparsity is not None else solve(weights, score, share or 1, count, times)
                levels[score] = choose(weights, score, at, count)
            masks: list[Masks] = [{}, *levels.values()]
            calls = {}
            for number, each in enumerate(masks):
                path = Path(folder) / f"{number}.onnx"
                path.write_bytes(with_masks(model, names, each).SerializeToString())
                calls[number] = partial(Session(path, 1), image)
            found = measure(calls, 0, Effort(1.0, seconds), perf_counter)
            total = sum(weight.numel() for weight in weights.values())
            for number, (score, each) in enumerate(levels.items(), start=1):
                density, latency = densities(each), found[number]
                kept = sum(int(mask.sum()) for mask in each.values()) / total
                macs = effective_macs(count, density) / count.total
                print(
                    f"{title:14} {score:8} {kept:6.3f} {macs:6.3f} {times.share(density):9.3f} "
                    f"{latency.ratio:8.3f} {latency.quartiles[0]:.3f}-{latency.quartiles[1]:.3f}"
                )


if __name__ == "__main__":
    main(*sys.argv[1:3])
