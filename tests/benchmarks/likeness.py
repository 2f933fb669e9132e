"""Measures the share of the squared weights that 1x4 blocks keep, with and without like channels together.

Each convolution keeps the same share of its blocks; the figures are means over the convolutions that are not
depthwise and have at least four inputs.

Run: python -m tests.benchmarks.likeness tf_efficientnet_lite0 [--checkpoint lite0.safetensors]
"""

import argparse
from copy import deepcopy

import numpy as np
import timm
from torch import Tensor, nn

from nestify.model.spec import describe_model
from nestify.recipe.levels import Level, parse_pattern
from nestify.schedule.likeness import group_channels
from nestify.schedule.units import Units

SPARSITIES = (0.7, 0.8, 0.9, 0.95)


def kept(weight: Tensor, pattern: str, sparsity: float) -> float:
    """Return the share of the squared weights that the best blocks hold."""
    units = Units(weight, parse_pattern(pattern))
    energy = units.energy.double() * (1 if units.sizes is None else units.sizes)
    best = energy.sort(descending=True).values
    return float(best[: round((1 - sparsity) * len(best))].sum() / best.sum())


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--checkpoint", default="", help="weights; random ones without it")
    options = parser.parse_args()
    network = timm.create_model(options.model, checkpoint_path=options.checkpoint).eval()
    grouped = deepcopy(network)
    levels = [Level("core", 0.8, parse_pattern("1x4")), Level("full", 0.0)]
    assert group_channels(grouped, describe_model(grouped), levels, None) is None
    rows = {"unstructured": network, "1x4": network, "1x4, like channels together": grouped}
    print(
        f"| | {' | '.join(f'{sparsity:.0%}' for sparsity in SPARSITIES)} |\n|---{'|---' * len(SPARSITIES)}|"
    )
    for name, model in rows.items():
        weights = [
            module.weight.data
            for module in model.modules()
            if isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels >= 4
        ]
        pattern = name.partition(",")[0]
        cells = [np.mean([kept(weight, pattern, sparsity) for weight in weights]) for sparsity in SPARSITIES]
        print(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")


if __name__ == "__main__":
    main()
