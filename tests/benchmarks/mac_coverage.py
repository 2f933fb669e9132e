"""Does the MAC counter know every family of timm models? Compares it with torch's own FLOP counter.

    python tests/benchmarks/mac_coverage.py                 # the smallest model of every family, minutes
    python tests/benchmarks/mac_coverage.py resnet swin_transformer

torch's counter works below autograd, on the operators that are executed, and counts two FLOPs for a MAC;
ours works on a trace of the calls that the model makes. Neither counts norms, pooling or interpolation.
oneDNN is disabled for torch's counter, which does not count its recurrent kernels (sequencer2d_s: 41 % of
the MACs), and attention is computed as matrix products, because some versions do not count the fused
kernels of a CPU. MACs without weights are products of activations (attention) or products with fixed
kernels (tresnet's blur).
"""

import sys
import warnings
from dataclasses import dataclass

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nestify.schedule.costs import count_macs

MAX_PARAMETERS = 450_000_000  # counting makes a copy: 3.6 GB in total
MAX_SIDE = 256  # pixels; larger inputs are reduced if the model allows it


@dataclass(frozen=True)
class Row:
    """Results of one family; MACs are per image.

    Attributes:
        family: name of the family.
        model: name of its smallest model.
        side: side of the square input in pixels.
        macs: MACs according to nestify.
        torch_macs: MACs according to torch.
        attributed: share of the MACs that belong to a weight.
        not_skippable: number of weights whose MACs cannot be skipped.
        uncounted: operators that nestify's counter does not know, with the number of their calls.
    """

    family: str
    model: str
    side: int
    macs: int
    torch_macs: int
    attributed: float
    not_skippable: int
    uncounted: str


def smallest(family: str) -> tuple[str, int]:
    """Return the name and the number of parameters of the family's smallest model."""
    sizes = {}
    for name in timm.list_models(module=family):
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except (
            RuntimeError,
            NotImplementedError,
            TypeError,
        ):  # needs values, or a missing package
            model = timm.create_model(name)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    name = min(sizes, key=lambda name: sizes[name])
    return name, sizes[name]


def build(name: str) -> tuple[nn.Module, int]:
    """Build the untrained model; return it and the side of its square input, at most MAX_SIDE if possible."""
    model = timm.create_model(name)
    side = model.pretrained_cfg["input_size"][-1]
    if side <= MAX_SIDE:
        return model, side
    if not model.pretrained_cfg.get("fixed_input_size"):
        return model, 224
    try:
        return timm.create_model(name, img_size=224), 224
    except TypeError:
        return model, side


def measure(family: str, name: str) -> Row:
    """Count the MACs of a model with both counters."""
    model, side = build(name)
    count = count_macs(model, (3, side, side))
    plain = torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain[0], plain[1], FlopCounterMode(display=False) as flops:
        model.eval().requires_grad_(False)(torch.zeros(1, 3, side, side))  # its hooks fail with gradients
    return Row(
        family=family,
        model=name,
        side=side,
        macs=count.total,
        torch_macs=flops.get_total_flops() // 2,
        attributed=sum(count.by_weight.values()) / count.total,
        not_skippable=len(count.not_skippable),
        uncounted=", ".join(f"{operator} {times}" for operator, times in count.uncounted.items()),
    )


def main(families: list[str]) -> None:
    """Print the table."""
    warnings.simplefilter("ignore")  # warnings of the models
    torch.set_num_threads(1)
    console = Console(width=160)
    headings = (
        "family",
        "model",
        "input",
        "MACs",
        "torch",
        "ratio",
        "in weights",
        "not skippable",
        "uncounted",
    )
    table = Table(*headings)
    left_out = []
    for family in track(families or timm.list_modules(), console=Console(stderr=True)):
        if not timm.list_models(module=family):
            left_out.append(f"{family}: registers no model")
            continue
        name, parameters = smallest(family)
        if parameters > MAX_PARAMETERS:
            left_out.append(f"{family}: its smallest model, {name}, has {parameters:,} parameters")
            continue
        row = measure(family, name)
        table.add_row(
            row.family,
            row.model,
            str(row.side),
            f"{row.macs:,}",
            f"{row.torch_macs:,}",
            f"{row.macs / row.torch_macs:.4f}",
            f"{row.attributed:.1%}",
            str(row.not_skippable),
            row.uncounted,
        )
    console.print(table, *left_out, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
