"""This machine's processor. No torch here."""

import os
import platform
import re
from pathlib import Path


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
