"""Measures the cost of training narrower levels, and their latency compared with their MACs.

    OMP_NUM_THREADS=1 python tests/benchmarks/narrow_levels.py [--models resnet18,vit_tiny_patch16_224]

Training: time of one nested step of levels 0.25 / 0.5 / 1, divided by the sum of the steps of the three
extracted networks, each with its own weights, gradients and optimizer. Both sides alternate in one process,
and the median of the ratios of all pairs is printed (goal: 1.10).

Latency: time of the extracted level divided by that of the full timm model, in alternating forward passes, at
batch sizes 1 and 16, next to the ratio of the MACs; medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import timm
import torch
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from nestify.model.graph.block_map import map_blocks
from nestify.model.graph.channel_map import map_channels
from nestify.model.level_sizes import LevelSizes
from nestify.model.nested_model import NestedModel
from nestify.model.spec import describe_model
from nestify.recipe.levels import Level
from nestify.schedule.channels import channel_counts
from nestify.schedule.costs import count_macs
from nestify.training.task import NestedTask, Teacher

WIDTHS = (0.25, 0.5, 1.0)
GOAL = 1.10
Step = Callable[[], object]


def make(name: str, size: int) -> NestedModel:
    """Return a nested model with random weights and three widths."""
    torch.manual_seed(0)
    argument = {"img_size": size} if get_pretrained_cfg(name).fixed_input_size else {}
    network = timm.create_model(name, num_classes=100, **argument).eval()
    channels = map_channels(network, (3, size, size))
    levels = [Level(f"l{k}", 0.0, width=width) for k, width in enumerate(WIDTHS)]
    counts = tuple(channel_counts(channels.groups, levels, 8))
    level_sizes = LevelSizes(channels, map_blocks(channels), counts, (frozenset(),) * len(counts))
    spec = describe_model(network, (3, size, size))
    return NestedModel(network, spec, [level.name for level in levels], masked=(), level_sizes=level_sizes)


def training_network(nested: NestedModel, level: int) -> nn.Module:
    """Return a level as a separate network that is ready for training."""
    assert nested.level_sizes is not None
    if not nested.is_smaller(level):
        return deepcopy(nested.network).train()
    device = torch.device("cpu")
    network = deepcopy(nested.level_sizes.skeleton(level, training=True, device=device))
    tensors = nested.at_level(level).state_dict()
    network.load_state_dict(tensors, assign=True)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in dict(nested.network.named_parameters()))
    return network


def make_step(loss: Callable[[], object], network: nn.Module) -> Step:
    """Return a training step: zero the gradients, forward and backward pass, SGD step."""
    optimizer = create_optimizer_v2(network, opt="sgd", lr=1e-4, weight_decay=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss()
        optimizer.step()

    return step


def training_ratio(nested: NestedModel, images: Tensor, target: Tensor, rounds: int) -> float:
    """Return the median ratio of a nested step's time to the sum of the plain steps' times."""
    criterion = nn.CrossEntropyLoss()
    plain = [training_network(nested, level) for level in (1, 2, 3)]
    task = NestedTask(nested, criterion, weights=[1] * 3, distill=[0] * 3, teacher=Teacher("none"))
    nested.train()
    together = make_step(partial(task.backward, images, target), nested)
    alone = [make_step(lambda n=n: criterion(n(images), target).backward(), n) for n in plain]  # type: ignore[misc]
    ratios = []
    for _ in range(rounds + 1):
        start = time.process_time()
        together()
        middle = time.process_time()
        for step in alone:
            step()
        ratios.append((middle - start) / (time.process_time() - middle))
    nested.eval()
    return statistics.median(ratios[1:])  # the first round warms up


@torch.no_grad()
def latency_ratio(level: nn.Module, full: nn.Module, images: Tensor, rounds: int) -> float:
    """Return the ratio of the level's median time to the full model's median time."""
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 2):
        for network, seconds in zip((level, full), times, strict=True):
            start = time.process_time()
            network(images)
            seconds.append(time.process_time() - start)
    level_seconds, full_seconds = (statistics.median(seconds[2:]) for seconds in times)
    return level_seconds / full_seconds


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="resnet18,vit_tiny_patch16_224")
    parser.add_argument("--train-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"training: nested step / sum of plain steps, 64 images of {options.train_size} px (goal {GOAL})")
    for name in options.models.split(","):
        nested = make(name, options.train_size)
        images = torch.randn(64, 3, options.train_size, options.train_size)
        ratio = training_ratio(nested, images, torch.randint(100, (64,)), options.rounds)
        print(f"{name:<28}{ratio:8.3f}", flush=True)
    print(f"\nlatency at {options.size} px: level / full timm model")
    print(f"{'model':<28}{'width':>6}{'MACs':>8}{'batch 1':>9}{'batch 16':>10}")
    for name in options.models.split(","):
        nested = make(name, options.size).eval()
        size = nested.spec.input_size
        macs = count_macs(nested.network, size).total
        for number, width in enumerate(WIDTHS[:-1], start=1):
            level = nested.at_level(number)
            share = count_macs(level, size).total / macs
            ratios = [
                latency_ratio(level, nested.network, torch.randn(batch, *size), options.rounds)
                for batch in (1, 16)
            ]
            print(f"{name:<28}{width:>6}{share:>8.3f}{ratios[0]:>9.3f}{ratios[1]:>10.3f}", flush=True)


if __name__ == "__main__":
    main()
