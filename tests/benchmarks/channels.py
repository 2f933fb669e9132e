"""Which families of timm models can the channel schedule make narrower? Tries the smallest model of each.

    python tests/benchmarks/channels.py                       # all families, half an hour on one core
    python tests/benchmarks/channels.py --only vgg,swin_transformer
    python tests/benchmarks/channels.py --markdown > channels.md

Random weights, small images, double precision where the model can. A family works where the logits stay as
they are when the units of every group are in a random order, where a level without some random units has the
logits of the model in which they are zero (in the groups where that is the same), and where the level with
half of every group's units runs, with fewer MACs. Differences are relative to what other images change in
the logits. Every family has its own process. Works where processes can be forked.
"""

import sys
import time
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
from apart import Row, Tell, example, walk_families

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own deprecations while it is imported by others
    import torch
    from torch import Tensor, nn
    from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))
from nestify.model.graph.channel_map import ChannelMap, map_channels, permute_channels
from tests.family_walk import smallest_model
from tests.model.graph.builders import cut, difference, load_tensors, narrow, random_units, zero_units

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Of the differences; some models compute in float32 whatever they are given."""
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


def _try(family: str, tell: Tell) -> str:
    name = smallest_model(family)
    model, images = example(name)
    side = images.shape[-1]
    tell({"variant": name, "input": f"{side}x{side}"})
    start = time.perf_counter()
    channels = map_channels(model, (3, side, side))
    seconds = time.perf_counter() - start
    units = sum(group.units for group in channels.groups)
    row = {"groups": str(len(channels.groups)), "units": str(units), "seconds": f"{seconds:.1f}"}
    tell(row)
    logits = model(images)
    spread = difference(logits[:1], logits[1:])
    offs = {
        "permuted": difference(_permuted(model, channels)(images), logits) / spread,
        "zeroed": _dropped_against_zeroed(model, channels, images) / spread,
    }
    tell({key: f"{off:.0e}" for key, off in offs.items()} | _left(model, channels, images))
    wrong = [key for key, off in offs.items() if not off < TOLERANCE[images.dtype]]
    if wrong:
        return f"WRONG: {' and '.join(wrong)}"
    return f"works, whole: {', '.join(sorted(channels.unknown))}" if channels.unknown else "works"


def _permuted(model: nn.Module, channels: ChannelMap) -> nn.Module:
    rng = np.random.default_rng(0)
    model = deepcopy(model)
    permute_channels(model, channels, [rng.permutation(group.units) for group in channels.groups])
    return model


def _dropped_against_zeroed(model: nn.Module, channels: ChannelMap, images: Tensor) -> float:
    """Largest difference between logits of a level without some units, and of the model where they are 0."""
    unmixed = [k for k, group in enumerate(channels.groups) if not group.mixed]
    kept = random_units(channels, 0, unmixed)
    level = load_tensors(narrow(channels, kept), cut(channels, model, channels.axes(kept)))
    return difference(level(images), zero_units(channels, model, kept)(images))


def _left(model: nn.Module, channels: ChannelMap, images: Tensor) -> Row:
    """Shares of the parameters and MACs that half of every group's units leave."""
    kept = [np.arange(max(1, group.units // 2)) for group in channels.groups]
    level = load_tensors(narrow(channels, kept), cut(channels, model, channels.axes(kept)))
    sizes = [sum(p.numel() for p in module.parameters()) for module in (level, model)]
    flops = []
    for module in (level, model):
        module.requires_grad_(False)  # the counter's hooks take no parameter that is given to a module
        with FlopCounterMode(display=False) as counter:
            assert torch.isfinite(module(images)).all()
        flops.append(counter.get_total_flops())
    return {
        "parameters left": f"{sizes[0] / sizes[1]:.2f}",
        "MACs left": f"{flops[0] / flops[1]:.2f}",
    }


if __name__ == "__main__":
    sys.exit(walk_families(__doc__ or "", COLUMNS, _try))
