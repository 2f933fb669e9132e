"""The machine that measures, as far as latencies depend on it."""

import os
import platform
import re
from pathlib import Path

import torch

from nestify.measurements import Machine


def this_machine(device: torch.device) -> Machine:
    """What latencies on a device of this machine depend on besides the network."""
    cpu = _cpu_name()
    return Machine(
        cpu=cpu,
        cores=_cores(),
        device=device.type,
        device_name=_label(torch.cuda.get_device_name(device)) if device.type == "cuda" else cpu,
        system=_label(f"{platform.system()} {platform.machine()}"),
        torch=_label(torch.__version__),
    )


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model; its architecture where the system does not tell."""
    try:
        found = re.search(r"^model name\s*:(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except (OSError, ValueError):
        found = None
    return _label(found[1] if found else platform.processor() or platform.machine() or "unknown")


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _label(text: str) -> str:
    return " ".join("".join(letter for letter in text if letter.isprintable() or letter.isspace()).split())[
        :200
    ]
