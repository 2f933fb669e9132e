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

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from copy import deepcopy
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own deprecations while it is imported by others
    import timm
    import torch
    from torch import Tensor, nn
    from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from channels.builders import cut, difference, loaded, random_units, randomise, zeroed  # tests are no package
from family_walk import SMALLER, _plain_model, smallest_model

from nestify.channels import ChannelMap, find_channels, permute_channels
from nestify.errors import NestifyError

GIB = 2**30
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

Row = dict[str, str]


def main() -> int:
    """Exit code 1 where a family neither works nor is refused."""
    options = _options()
    families = options.only.split(",") if options.only else timm.list_modules()
    if unknown := set(families) - set(timm.list_modules()):
        sys.exit(f"not a family of timm {timm.__version__}: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # forked processes must not inherit threads
    progress = Console(stderr=True)
    rows = []
    for family in track(families, console=progress):
        rows.append({"family": family} | _try_apart(family, options.memory * GIB, options.timeout))
        progress.print(escape(" | ".join(rows[-1].values())), soft_wrap=True)
    _print(rows, options.markdown)
    print(f"\n{sum(row['result'].startswith('works') for row in rows)} of {len(rows)} families work")
    return int(any(row["result"].startswith(("WRONG", "FAILS")) for row in rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help="families, separated by commas; all by default", metavar="A,B")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for each family (default 600)")
    parser.add_argument("--memory", type=int, default=10, help="GiB for each family (default 10)")
    return parser.parse_args()


def _try_apart(family: str, memory_bytes: int, timeout: int) -> Row:
    """Try a family in a process of its own, which tells cell by cell what it found."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(family, memory_bytes, theirs))
    process.start()
    theirs.close()
    row = dict.fromkeys((*COLUMNS, "result"), "")
    end = time.perf_counter() + timeout
    try:
        while not row["result"]:
            if ours.poll(max(0, end - time.perf_counter())):
                row |= json.loads(ours.recv())
            else:
                row["result"] = f"FAILS: not done after {timeout} seconds"
                process.kill()
    except EOFError:
        process.join()
        row["result"] = f"FAILS: its process ended with exit code {process.exitcode}"
    process.join()
    return row


def _child(family: str, memory_bytes: int, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # models print, too
    warnings.simplefilter("ignore")
    try:
        with torch.no_grad():
            result = _try(family, pipe)
    except NestifyError as error:
        result = f"refused: {error}"
    except Exception as error:  # whatever happens is the result
        result = f"FAILS: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    pipe.send(json.dumps({"result": result}))


def _try(family: str, pipe: Connection) -> str:
    torch.manual_seed(0)
    name = smallest_model(family)
    model, side = _plain_model(name, dict(SMALLER.get(name, {})))
    side = side or model.pretrained_cfg["input_size"][-1]
    pipe.send(json.dumps({"variant": name, "input": f"{side}x{side}"}))
    model, images = _in_double(randomise(model.eval()), torch.randn(2, 3, side, side))
    start = time.perf_counter()
    channels = find_channels(model, (3, side, side))
    seconds = time.perf_counter() - start
    units = sum(group.units for group in channels.groups)
    row = {"groups": str(len(channels.groups)), "units": str(units), "seconds": f"{seconds:.1f}"}
    pipe.send(json.dumps(row))
    logits = model(images)
    spread = difference(logits[:1], logits[1:])
    offs = {
        "permuted": difference(_permuted(model, channels)(images), logits) / spread,
        "zeroed": _dropped_against_zeroed(model, channels, images) / spread,
    }
    pipe.send(json.dumps({key: f"{off:.0e}" for key, off in offs.items()} | _left(model, channels, images)))
    wrong = [key for key, off in offs.items() if not off < TOLERANCE[images.dtype]]
    if wrong:
        return f"WRONG: {' and '.join(wrong)}"
    return f"works, whole: {', '.join(sorted(channels.unknown))}" if channels.unknown else "works"


def _in_double(model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    """The model in float64, or as it is where it casts by itself."""
    double = deepcopy(model).double()
    for buffer in double.buffers():
        if buffer.is_floating_point():
            buffer.nan_to_num_(posinf=10, neginf=-10)
    try:
        double(images.double())
    except RuntimeError:
        return model, images
    return double, images.double()


def _permuted(model: nn.Module, channels: ChannelMap) -> nn.Module:
    rng = np.random.default_rng(0)
    model = deepcopy(model)
    permute_channels(model, channels, [rng.permutation(group.units) for group in channels.groups])
    return model


def _dropped_against_zeroed(model: nn.Module, channels: ChannelMap, images: Tensor) -> float:
    """Largest difference between logits of a level without some units, and of the model where they are 0."""
    unmixed = [k for k, group in enumerate(channels.groups) if not group.mixed]
    kept = random_units(channels, 0, unmixed)
    level = loaded(channels.narrowed(kept), cut(channels, model, channels.axes(kept)))
    return difference(level(images), zeroed(channels, model, kept)(images))


def _left(model: nn.Module, channels: ChannelMap, images: Tensor) -> Row:
    """Shares of the parameters and MACs that half of every group's units leave."""
    kept = [np.arange(max(1, group.units // 2)) for group in channels.groups]
    level = loaded(channels.narrowed(kept), cut(channels, model, channels.axes(kept)))
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


def _print(rows: list[Row], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        for row in rows:
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in row.values()) + " |")
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(escape, row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    sys.exit(main())
