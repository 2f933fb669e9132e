"""Does the MAC counter know every family of timm models? Compares it with torch's own FLOP counter.

    python tests/benchmarks/mac_coverage.py                 # the smallest model of every family, minutes
    python tests/benchmarks/mac_coverage.py resnet swin_transformer

torch's counter works below autograd, on the operators that finally run, and counts two FLOPs for a MAC; ours
works on a trace of the calls that the model makes. Both leave norms, pooling and interpolation out. oneDNN is
off for torch's counter, which does not look into its recurrent kernels (sequencer2d_s: 41 % of the MACs), and
attention is computed as matrix products, since some versions count none for the fused kernels of a CPU.
MACs that are not in weights are products of activations (attention) or with fixed kernels (tresnet's blur).
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

MAX_PARAMETERS = 450_000_000  # a copy is made to count: 3.6 GB in all
MAX_SIDE = 256  # pixels; larger inputs are made smaller where the model lets us


@dataclass(frozen=True)
class Row:
    """One family; MACs are per image."""

    family: str
    model: str
    side: int
    macs: int
    torch_macs: int
    attributed: float
    not_skippable: int
    uncounted: str


def smallest(family: str) -> tuple[str, int]:
    """Name and number of parameters of the family's smallest model."""
    sizes = {}
    for name in timm.list_models(module=family):
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except (RuntimeError, NotImplementedError, TypeError):  # needs values, or a package we lack
            model = timm.create_model(name)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    name = min(sizes, key=lambda name: sizes[name])
    return name, sizes[name]


def build(name: str) -> tuple[nn.Module, int]:
    """The model, untrained, and the side of its square input in pixels, at most MAX_SIDE where it can be."""
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
    model, side = build(name)
    count = count_macs(model, (3, side, side))
    plain = torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain[0], plain[1], FlopCounterMode(display=False) as flops:
        model.eval().requires_grad_(False)(torch.zeros(1, 3, side, side))  # its hooks trip over gradients
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
    warnings.simplefilter("ignore")  # of the models' own making
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
