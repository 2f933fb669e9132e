"""Which families of timm models can the channel schedule make narrower? Tries the smallest model of each.

    python tests/benchmarks/channels.py                       # all families, half an hour on one core
    python tests/benchmarks/channels.py --only vgg,swin_transformer
    python tests/benchmarks/channels.py --markdown > channels.md

Uses random weights, small images, and double precision if the model allows it. A family works if the logits
do not change when the units of every group are permuted randomly, if a level without some random units has
the logits of the model in which these units are zero (in the groups where this is equivalent), and if the
level with half of every group's units runs, with fewer MACs. Differences are relative to the difference in
logits between two images. Every family has its own process. Requires that processes can be forked.
"""

import sys
import time
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
from apart import Row, SendCells, example, walk_families

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own deprecation warnings on import
    import torch
    from torch import Tensor, nn
    from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))
from nestify.model.graph.channel_map import ChannelMap, map_channels, permute_channels
from tests.family_walk import smallest_model
from tests.model.graph.builders import cut, difference, load_tensors, narrow, random_units, zero_units

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Largest allowed difference; some models compute in float32 regardless of the type of their input."""
COLUMNS = (
    "variant",
    "input",
    "groups",
    "units",
    "parameters left",
    "MACs left",
    "permuted",
    "zeroed",
    "seconds",
)


def _try(family: str, send: SendCells) -> str:
    name = smallest_model(family)
    model, images = example(name)
    side = images.shape[-1]
    send({"variant": name, "input": f"{side}x{side}"})
    start = time.perf_counter()
    channels = map_channels(model, (3, side, side))
    seconds = time.perf_counter() - start
    units = sum(group.units for group in channels.groups)
    row = {"groups": str(len(channels.groups)), "units": str(units), "seconds": f"{seconds:.1f}"}
    send(row)
    logits = model(images)
    spread = difference(logits[:1], logits[1:])
    differences = {
        "permuted": difference(_permuted(model, channels)(images), logits) / spread,
        "zeroed": _dropped_against_zeroed(model, channels, images) / spread,
    }
    send({key: f"{off:.0e}" for key, off in differences.items()} | _shares_left(model, channels, images))
    wrong = [key for key, off in differences.items() if not off < TOLERANCE[images.dtype]]
    if wrong:
        return f"WRONG: {' and '.join(wrong)}"
    return f"works, at full width: {', '.join(sorted(channels.unknown))}" if channels.unknown else "works"


def _permuted(model: nn.Module, channels: ChannelMap) -> nn.Module:
    rng = np.random.default_rng(0)
    model = deepcopy(model)
    permute_channels(model, channels, [rng.permutation(group.units) for group in channels.groups])
    return model


def _dropped_against_zeroed(model: nn.Module, channels: ChannelMap, images: Tensor) -> float:
    """Compare the logits of a level without some units with those of the model in which these units are 0."""
    unmixed = [k for k, group in enumerate(channels.groups) if not group.mixed]
    kept = random_units(channels, 0, unmixed)
    level = load_tensors(narrow(channels, kept), cut(channels, model, channels.axes(kept)))
    return difference(level(images), zero_units(channels, model, kept)(images))


def _shares_left(model: nn.Module, channels: ChannelMap, images: Tensor) -> Row:
    """Return the shares of parameters and MACs that are left with half of every group's units."""
    kept = [np.arange(max(1, group.units // 2)) for group in channels.groups]
    level = load_tensors(narrow(channels, kept), cut(channels, model, channels.axes(kept)))
    sizes = [sum(p.numel() for p in module.parameters()) for module in (level, model)]
    flops = []
    for module in (level, model):
        module.requires_grad_(False)  # the counter's hooks fail if a parameter is passed to a module
        with FlopCounterMode(display=False) as counter:
            assert torch.isfinite(module(images)).all()
        flops.append(counter.get_total_flops())
    return {
        "parameters left": f"{sizes[0] / sizes[1]:.2f}",
        "MACs left": f"{flops[0] / flops[1]:.2f}",
    }


if __name__ == "__main__":
    sys.exit(walk_families(__doc__ or "", COLUMNS, _try))
