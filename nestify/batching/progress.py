"""How far a job has got, by the last lines of its log of metrics."""

import json
from pathlib import Path

_TAIL_BYTES = 2**13


def progress(metrics: Path) -> str:
    """`train 120/500`: the phase, and its steps so far, as of the last epoch; empty where nothing is known.

    Args:
        metrics: the job's `metrics.jsonl`, which another process writes.
    """
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            record = json.loads(line)
            return f"{record['event']} {record['step']}/{record['total_steps']}"
        except (ValueError, KeyError, TypeError, RecursionError):  # the line is cut, or of another kind
            continue
    return ""
