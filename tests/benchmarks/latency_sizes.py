"""Time of narrower and shallower levels: predicted from the layer times, and measured on ONNX Runtime.

    OMP_NUM_THREADS=1 python tests/benchmarks/latency_sizes.py resnet18 224

All levels run in turns with the full model: one image, one thread, random weights. Measured is the ratio of
the 25th percentiles of processor time.
"""

import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

import numpy as np
import timm

from nestify.engine.profile import measure_layers
from nestify.engine.session import Session
from nestify.evaluation.bench import Effort, interleave
from nestify.exports.onnx import translate
from nestify.exports.target import ExportFacts
from nestify.model.level_sizes import LevelSizes
from nestify.model.spec import describe_model, state_tensors
from nestify.recipe.levels import Level
from nestify.schedule.blocks import find_removable, kept_blocks
from nestify.schedule.budgets import MEASURED_WIDTHS
from nestify.schedule.channels import channel_counts, channel_path

DIVISOR = 8
STEPS = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
"""Places on the way from the narrowest network to the full one; one group of channels grows at a time."""
DEPTHS = (0.25, 0.5, 0.75)


def main(architecture: str, pixels: int, seconds: float = 10.0) -> None:
    """Print the predicted and the measured time of each level over the full one's."""
    kwargs = {"img_size": pixels} if "vit" in architecture else {}
    network = timm.create_model(architecture, **kwargs).eval()
    spec = describe_model(network, (3, pixels, pixels))
    removable, tensors = find_removable(network, spec), state_tensors(network)
    groups = removable.channels.groups
    full = tuple(group.units for group in groups)

    def make(counts: tuple[int, ...], depth: float = 1.0):
        kept = kept_blocks(removable.ranking, depth)
        skipped = frozenset(block.name for block in removable.ranking if block not in kept)
        sizes = LevelSizes(removable.channels, removable.layers, (counts,), (skipped,))
        return sizes.make_network(
            1, {name: sizes.cut(1, name, t) for name, t in tensors.items() if sizes.has_tensor(1, name)}
        )

    path = channel_path(groups, DIVISOR)
    measured = [Level("", 0.0, width=width) for width in MEASURED_WIDTHS]
    rows = [path[0][1], *channel_counts(groups, measured, DIVISOR)]
    times = measure_layers([*map(make, rows), network], spec, packed=False)

    steps = [path[int(step * len(path))] for step in STEPS]
    levels = {f"width {width:.2f}": make(counts) for width, counts in steps}
    levels |= {f"depth {depth:g}": make(full, depth) for depth in DEPTHS}
    levels["width 0.5, depth 0.5"] = make(rows[2], 0.5)
    facts = ExportFacts(
        spec.architecture, spec.kwargs, spec.num_classes, None, spec.preprocessing, 1, "full", 0.0, {}
    )
    image = np.random.default_rng(0).standard_normal((1, *spec.input_size)).astype(np.float32)
    calls = {}
    with TemporaryDirectory() as folder:
        for number, level in enumerate([network, *levels.values()]):
            file = Path(folder) / f"{number}.onnx"
            file.write_bytes(translate(level, facts, 1, None).SerializeToString())
            calls[number] = partial(Session(file, 1), image)
        rounds = interleave(calls, Effort(1.0, seconds), process_time)
    quartiles = [np.percentile([times[number] for times in rounds], 25) for number in calls]
    print(f"{architecture} at {pixels} px\n{'level':22} predicted measured")
    for number, (name, level) in enumerate(levels.items(), start=1):
        own = dict(level.named_parameters())
        shapes = {name: tuple(own[name].shape) if name in own else None for name in spec.maskable}
        print(f"{name:22} {times.share({}, shapes):9.3f} {quartiles[number] / quartiles[0]:8.3f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
