"""This machine: its processor, its compute device, and the number of processes that load images.

Only `pick_device` imports torch.
"""

import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from nestify.errors import RecipeError, foreign_code
from nestify.launcher import Launch, read_launch

if TYPE_CHECKING:
    import torch


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's model name, or its architecture if the system does not report the model.

    Args:
        cpuinfo: file in the format of Linux's `/proc/cpuinfo`; it may be missing.
    """
    try:
        found = re.search(r"^model name\s*:(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except (OSError, ValueError):
        found = None
    return printable_line(found[1] if found else platform.processor() or platform.machine() or "unknown")


def cores() -> int:
    """Return the number of logical processors that this process may use."""
    return len(processors())


def processors() -> tuple[int, ...]:
    """Return the numbers of the logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def memory_bytes() -> int | None:
    """Return the machine's memory in bytes; None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def printable_line(text: str) -> str:
    """Reduce a name that the system reports to one printable line of at most 200 characters."""
    printable = "".join(letter for letter in text if letter.isprintable() or letter.isspace())
    return " ".join(printable.split())[:200]


def pick_device(name: str) -> "torch.device":
    """Return the device that a recipe names.

    Args:
        name: a torch device such as `cpu` or `cuda:1`, or `auto`: CUDA if available, otherwise the CPU.
            Each of several processes gets a GPU of its own, whatever the number.

    Raises:
        RecipeError: if the device is not available on this machine.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" or read_launch().size == 1:
            return torch.device(name)
    if name.partition(":")[0] == "cuda" and (launch := read_launch()).size > 1:
        name = f"cuda:{_gpu_number(launch, torch.cuda.device_count())}"
    with foreign_code(
        lambda reason: RecipeError(f"device = {name!r} is not available here; give auto or cpu")
    ):
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails on "meta", which creates tensors but computes nothing
    return device


def _gpu_number(launch: Launch, gpus: int) -> int:
    """Return the number of the GPU of one of several processes.

    Args:
        launch: the process.
        gpus: number of GPUs that this process sees; a launcher may show each process only its own.

    Raises:
        RecipeError: if this node has fewer GPUs than processes.
    """
    if launch.local_rank < gpus:
        return launch.local_rank
    if gpus == 1 and launch.launcher != "torchrun":
        return 0
    count = launch.local_size or f"{launch.local_rank + 1} or more"
    raise RecipeError(
        f"device = cuda: this node has {gpus} GPU{'s' * (gpus != 1)} for {count} processes; start as many "
        f"processes as GPUs (torchrun --nproc-per-node {max(gpus, 1)}), or use --device cpu"
    )


def pick_workers(requested: int | None, device: "torch.device", available: int | None = None) -> int:
    """Return the number of worker processes that load images for one process.

    Args:
        requested: the user's number; None chooses one per processor, at most 8, and 0 if the CPU trains,
            because workers would compete with the training for its processors.
        device: the device that trains.
        available: number of processors for this process, if it shares them with other processes.
    """
    if requested is not None:
        return requested
    return 0 if device.type == "cpu" else min(8, available or cores())


def workers_warning(workers: int, available: int | None = None) -> str | None:
    """Return a sentence if there are more worker processes than processors; None otherwise.

    Args:
        workers: number of worker processes of one process.
        available: number of processors for this process, if it shares them with other processes.
    """
    if available is not None and workers > available:
        return (
            f"data.workers = {workers} for each process is more than its share of the processors "
            f"({available}), so the workers compete for them; use --workers {available} or fewer"
        )
    available = cores()
    if workers <= available:
        return None
    return (
        f"data.workers = {workers} is more than the processors that this process may use ({available}), so "
        f"the workers compete for them; use --workers {available} or fewer"
    )
