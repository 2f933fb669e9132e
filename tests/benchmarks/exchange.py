"""Measures what is gained by exchanging gradients in pieces while lower levels still run.

    python tests/benchmarks/exchange.py [--model resnet18] [--schedule weight] [--images 16] [--rounds 7]

Two processes on this machine, of one thread each, train three levels with gloo. Steps that exchange all
gradients at the end alternate with steps that exchange them in pieces; the medians of the wall time and of
the pairs' ratios are printed. An exchange within one machine costs little: to see the effect, slow the
loopback device down (as root: `tc qdisc add dev lo root tbf rate 1gbit burst 1mb latency 500ms`, and at the
end `tc qdisc del dev lo root`).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import distributed, multiprocessing

import nestify
from nestify.training.distributed import World
from nestify.training.exchange import GradientExchange

LEVELS = {"weight": "0.95,0.8,0", "channel": "0.25,0.5,1"}


def main() -> None:
    """Start two processes; rank 0 prints what it has measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--schedule", choices=tuple(LEVELS), default="weight")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--images", type=int, default=16, help="images of each process")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--port", type=int, default=29651)
    multiprocessing.spawn(measure, (parser.parse_args(),), nprocs=2)


def measure(rank: int, options: argparse.Namespace) -> None:
    """Time steps of both kinds in turns."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    address = f"tcp://127.0.0.1:{options.port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    argument = {"img_size": options.size} if get_pretrained_cfg(options.model).fixed_input_size else {}
    images = torch.randn(options.images, 3, options.size, options.size)
    target = torch.randint(100, (options.images,))
    network = timm.create_model(options.model, num_classes=100, **argument)
    nested: Any = nestify.nest(
        network,
        levels=LEVELS[options.schedule],
        schedule=options.schedule,
        images=[(images, target)],
    )
    optimizer = torch.optim.SGD(nested.parameters(), lr=1e-3, momentum=0.9)
    nested.update(0)

    nested.backward(images, target, torch.nn.functional.cross_entropy)  # warms up, and makes the task
    task, gradients = nested._loop._task, nested._loop._gradients
    exchanges = {
        overlap: GradientExchange(World(rank, 2, overlap=overlap), nested, gradients.entry_levels)
        for overlap in (True, False)
    }

    def step(in_pieces: bool) -> float:
        exchange = exchanges[in_pieces]
        distributed.barrier()
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        exchange.start([level for level, _ in task.draw_levels()], len(images))
        task.backward(images, target, level_done=exchange.level_done)
        exchange.finish()
        gradients.apply()
        optimizer.step()
        distributed.barrier()
        return time.perf_counter() - start

    pairs = [(step(True), step(False)) for _ in range(options.rounds + 1)][1:]  # the first warms up
    if rank == 0:
        pieces, whole = (statistics.median(each) for each in zip(*pairs, strict=True))
        ratios = sorted(a / b for a, b in pairs)
        print(
            f"{options.model}, {options.schedule}: {pieces:.3f} s in pieces, {whole:.3f} s in one, "
            f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
