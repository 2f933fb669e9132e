"""Measures the training cost of nesting: one nested step against the plain timm steps of the same levels.

    python tests/benchmarks/training_overhead.py [--models resnet18,vit_tiny_patch16_224] [--size 64,128]

The baseline does not use nestify: for each level, a plain timm model with the level's masked weights does a
forward pass, a backward pass and an optimizer step. Nested and plain steps alternate in one process, and
the median of the ratios of all pairs is printed. Memory is the peak of the resident set minus the resident
set before the model was created, with each variant in its own process; the plain variant trains one level
with the same optimizer. `--with amp,compile,channels_last` applies to both sides: bfloat16, torch.compile
(the compilation is part of the first round, which is not counted), memory layout; `recompute` is gradient
checkpointing. On a CPU the time is processor time, so run it with OMP_NUM_THREADS=1.

    python tests/benchmarks/training_overhead.py --launches --models resnet50 --size 64

counts instead what a GPU would launch for the nested step and for the plain steps, and how often the host
would wait, on the simulated device of the tests (a list of tensors counts as one launch if their layouts
agree). The environment variable BATCH changes the number of images.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

SPARSITIES = (0.95, 0.8, 0.0)
BATCH = int(os.environ.get("BATCH", "64"))


def nested_step(
    name: str, size: int, optimizer: str, settings: Sequence[str], device: str = "cpu"
) -> Callable[[], None]:
    """Return a training step of all levels with nestify, without a teacher."""
    import timm
    import torch
    from timm.optim import create_optimizer_v2

    from nestify.model.nested_model import NestedModel
    from nestify.model.spec import describe_model
    from nestify.recipe.levels import Level
    from nestify.schedule.weights import select_entry_levels
    from nestify.training.gradients import LevelGradients
    from nestify.training.task import NestedTask, Teacher

    torch.manual_seed(0)
    layout = memory_format(settings)
    network = timm.create_model(name, num_classes=100, **size_argument(name, size)).to(memory_format=layout)
    names = [f"l{k}" for k in range(len(SPARSITIES))]
    nested = NestedModel(network, describe_model(network), names)
    levels = [Level(n, sparsity) for n, sparsity in zip(names, SPARSITIES, strict=True)]
    weights = {n: nested.shared_tensor(n) for n in nested.entry}
    nested.set_entry_levels(select_entry_levels(weights, levels))
    nested = nested.to(device)
    task = NestedTask(
        nested,
        torch.nn.CrossEntropyLoss(),
        weights=[1] * 3,
        distill=[0] * 3,
        teacher=Teacher("none"),
        autocast=lambda: autocast(settings, device),
        compiled="compile" in settings,
        recompute="recompute" in settings,
        device=torch.device(device),
    )
    chosen = create_optimizer_v2(nested, opt=optimizer, lr=1e-4, weight_decay=1e-4, momentum=0.9)
    images, target = (tensor.to(device) for tensor in batch(size))
    images = images.to(memory_format=layout)
    nested.train()
    gradients = LevelGradients(nested, task.level_weights)

    def step() -> None:
        chosen.zero_grad(set_to_none=True)
        task.backward(images, target)
        gradients.apply()
        chosen.step()

    return step


def plain_step(
    name: str, size: int, optimizer: str, settings: Sequence[str], sparsity: float, device: str = "cpu"
) -> Callable[[], None]:
    """Return a training step of one plain timm model whose smallest weights are zero."""
    import timm
    import torch
    from timm.optim import create_optimizer_v2

    torch.manual_seed(0)
    layout = memory_format(settings)
    model = timm.create_model(name, num_classes=100, **size_argument(name, size)).train()
    model = model.to(device, memory_format=layout)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and sparsity:
                threshold = (
                    parameter.abs().flatten().kthvalue(max(1, int(sparsity * parameter.numel()))).values
                )
                parameter.mul_(parameter.abs() > threshold)
    if "recompute" in settings:
        model.set_grad_checkpointing(True)
    chosen = create_optimizer_v2(model, opt=optimizer, lr=1e-4, weight_decay=1e-4, momentum=0.9)
    images, target = (tensor.to(device) for tensor in batch(size))
    images = images.to(memory_format=layout)
    criterion = torch.nn.CrossEntropyLoss()
    forward = torch.compile(model) if "compile" in settings else model

    def step() -> None:
        chosen.zero_grad(set_to_none=True)
        with autocast(settings, device):
            logits = forward(images)
        criterion(logits.float(), target).backward()
        chosen.step()

    return step


def autocast(settings: Sequence[str], device: str) -> "AbstractContextManager[object]":
    """Return the autocast context of a forward pass."""
    import torch

    return torch.autocast(device, torch.bfloat16) if "amp" in settings else nullcontext()


def memory_format(settings: Sequence[str]) -> "torch.memory_format":  # noqa: F821
    """Return the memory format of weights and images."""
    import torch

    return torch.channels_last if "channels_last" in settings else torch.contiguous_format


def size_argument(name: str, size: int) -> dict[str, int]:
    """Return the `img_size` argument if the architecture has a fixed input size."""
    from timm.models import get_pretrained_cfg

    return {"img_size": size} if get_pretrained_cfg(name).fixed_input_size else {}


def batch(size: int) -> tuple["torch.Tensor", "torch.Tensor"]:  # noqa: F821
    """Return random images and labels."""
    import torch

    return torch.randn(BATCH, 3, size, size), torch.randint(100, (BATCH,))


def measure_time(
    name: str, size: int, optimizer: str, settings: Sequence[str], rounds: int
) -> dict[str, float]:
    """Measure the median seconds of both sides and the median ratio."""
    nested = nested_step(name, size, optimizer, settings)
    plain = [plain_step(name, size, optimizer, settings, sparsity) for sparsity in SPARSITIES]
    pairs = []
    for _ in range(rounds + 1):
        start = time.process_time()
        nested()
        middle = time.process_time()
        for step in plain:
            step()
        pairs.append((middle - start, time.process_time() - middle))
    pairs = pairs[1:]  # the first round warms up
    return {
        "nested_s": statistics.median(a for a, _ in pairs),
        "plain_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def count_launches(name: str, size: int, optimizer: str, settings: Sequence[str]) -> dict[str, float]:
    """Count launches and waits of a step of both sides, after two steps that warm up."""
    from tests import simulated

    if problem := simulated.load_device():
        raise SystemExit(problem)

    def count(step: Callable[[], None]) -> simulated.Work:
        for _ in range(3):
            simulated.reset_work()
            step()
        return simulated.work()

    nested = count(nested_step(name, size, optimizer, settings, simulated.NAME))
    plain = [
        count(plain_step(name, size, optimizer, settings, sparsity, simulated.NAME))
        for sparsity in SPARSITIES
    ]
    return {
        "nested": nested.launches.total(),
        "plain": sum(work.launches.total() for work in plain),
        "waits": nested.waits.total(),
    }


def measure_memory(
    which: str, name: str, size: int, optimizer: str, settings: Sequence[str]
) -> dict[str, float]:
    """Measure the peak resident bytes minus those before the model was created."""
    import timm  # noqa: F401
    import torch

    import nestify.training.task  # noqa: F401

    warm = torch.nn.Conv2d(3, 8, 3)
    warm(torch.randn(1, 3, 8, 8)).sum().backward()  # allocates the libraries' own buffers
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if which == "nested":
        step = nested_step(name, size, optimizer, settings)
    else:
        step = plain_step(name, size, optimizer, settings, 0.8)
    for _ in range(3):
        step()
    return {"bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024.0}


def in_child(*arguments: object) -> dict[str, float]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(arguments)]
    environment = dict(os.environ)
    if arguments[0] != "time":  # otherwise the allocator keeps freed memory, which the peak would include
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print one row per model and size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="resnet18,vit_tiny_patch16_224")
    parser.add_argument("--size", default="64,128")
    parser.add_argument("--opt", default="sgd")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--with", dest="settings", default="", help="any of amp, compile, channels_last, recompute"
    )
    parser.add_argument("--launches", action="store_true", help="count launches on a simulated GPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, *rest = json.loads(options.child)
        print(json.dumps(measure_time(*rest) if kind == "time" else measure_memory(kind, *rest)))
        return
    settings = options.settings.split(",") if options.settings else []
    if options.launches:
        for name in options.models.split(","):
            for size in map(int, options.size.split(",")):
                found = count_launches(name, size, options.opt, settings)
                ratio = found["nested"] / found["plain"]
                print(
                    f"{name} at {size}: {found['nested']} launches, {found['plain']} of plain steps, "
                    f"ratio {ratio:.3f}, {found['waits']} waits"
                )
        return
    print(f"{BATCH} images, levels {SPARSITIES}, {options.opt} {options.settings}; ratios are nested / plain")
    print(
        f"{'model':<24}{'pixels':>7}{'nested s':>10}{'plain s':>10}{'time ratio':>12}"
        f"{'nested MiB':>12}{'memory ratio':>14}"
    )
    for name in options.models.split(","):
        for size in map(int, options.size.split(",")):
            timed = in_child("time", name, size, options.opt, settings, options.rounds)
            nested = in_child("nested", name, size, options.opt, settings)["bytes"]
            plain = in_child("plain", name, size, options.opt, settings)["bytes"]
            print(
                f"{name:<24}{size:>7}{timed['nested_s']:>10.3f}{timed['plain_s']:>10.3f}"
                f"{timed['ratio']:>12.3f}{nested / 2**20:>12.0f}{nested / plain:>14.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
