"""Compares the latency of each level of nested files with the full level, and with the ratio of their MACs.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/level_latency.py FILE... [--rounds 15]
"""

import argparse
import statistics
import time

import torch
from torch import nn

import nestify

BATCHES = (1, 16)


@torch.no_grad()
def processor_times(networks: list[nn.Module], images: torch.Tensor, rounds: int) -> list[float]:
    """Measure the median processor time of each network in seconds, alternately, after two warm-up rounds."""
    times: list[list[float]] = [[] for _ in networks]
    for _ in range(rounds + 2):
        for network, seconds in zip(networks, times, strict=True):
            start = time.process_time()
            network(images)
            seconds.append(time.process_time() - start)
    return [statistics.median(seconds[2:]) for seconds in times]


def main() -> None:
    """Print one Markdown row per level."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| file | level | width | depth | sparsity | dense MACs over full | batch 1 | batch 16 | top-1 % |")
    print("|---|---|---|---|---|---|---|---|---|")
    for path in options.files:
        report = nestify.read_report(path)
        levels = [nestify.load(path, level=level.level, check=False) for level in report.levels]
        ratios = []
        for batch in BATCHES:
            times = processor_times(levels, torch.randn(batch, *report.input_size), options.rounds)
            ratios.append([seconds / times[-1] for seconds in times])
        full = report.levels[-1].dense_macs or 1
        for level, *latency in zip(report.levels, *ratios, strict=True):
            share = (level.dense_macs or 0) / full
            top1 = "-" if level.top1 is None else f"{level.top1:.2f}"
            print(
                f"| {report.architecture} | {level.level} | {level.width:g} | {level.depth:g} | "
                f"{level.sparsity:.2f} | {share:.3f} | {latency[0]:.3f} | {latency[1]:.3f} | {top1} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
