"""This machine: its processor, the device that computes, and the processes that load images.

Only `pick_device` imports torch.
"""

import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from nestify.errors import RecipeError

if TYPE_CHECKING:
    import torch


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model; its architecture where the system does not tell."""
    try:
        found = re.search(r"^model name\s*:(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except (OSError, ValueError):
        found = None
    return label(found[1] if found else platform.processor() or platform.machine() or "unknown")


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def label(text: str) -> str:
    """A name that a system tells, in one line that a terminal can show."""
    shown = "".join(letter for letter in text if letter.isprintable() or letter.isspace())
    return " ".join(shown.split())[:200]


def pick_device(name: str) -> "torch.device":
    """The device of a recipe; `auto` is CUDA where there is one, else the CPU.

    Raises:
        RecipeError: for a device that is not here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" makes tensors, but computes nothing
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device = {name!r} is not available here; give auto or cpu") from error
    return device


def pick_workers(asked: int | None, device: "torch.device") -> int:
    """Number of processes that load images.

    Args:
        asked: the user's number. By default one per processor, at most 8; none where the CPU trains, since
            they would compete with the arithmetic.
    """
    if asked is not None:
        return asked
    return 0 if device.type == "cpu" else min(8, cores())


def workers_warning(workers: int) -> str | None:
    """Return a sentence if there are more worker processes than processors; None otherwise."""
    available = cores()
    if workers <= available:
        return None
    return (
        f"data.workers = {workers} is more than the processors that this process may use ({available}), so "
        f"the workers compete for them; use --workers {available} or fewer"
    )
