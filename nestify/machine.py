"""This machine: its processor, its memory, and the number of processes that load images."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

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


def release_memory() -> None:
    """Give free memory back to the system.

    The C library of Linux (glibc) keeps freed memory for each thread that used it, which adds up where
    several threads use large tensors in turns. Elsewhere this does nothing.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
