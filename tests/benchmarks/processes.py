"""Four gloo processes against one with the same images per step: the largest differences of a tensor.

    python -m tests.benchmarks.processes weight channel layer combined

Batch norm is synced. The digits, one epoch of 6 steps, on the CPU.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from nestify.compression import compress as api
from nestify.training.observer import Observer
from tests.training.processes import Processes
from tests.training.test_processes import DEEPER, SMALL, weights

COMBINED = """extends = "digits"
[schedule]
kind = "combined"
[[level]]
width = 0.5
sparsity = 0.5
[[level]]
sparsity = 0
"""
IMAGES = 16


def train(_: int, schedule: str, size: int) -> None:
    """Run in one of `size` processes."""
    options: dict[str, object] = {
        **SMALL,
        "schedule.kind": schedule,
        "levels": "0.8,0" if schedule == "weight" else "0.5,1",
        "data.max_train": 96,
        "train.epochs": 1,
        "train.eval_before": False,
        "train.batch_size": IMAGES // size,
        "train.sync_batch_norm": True,
        "output": f"{size}.nested.safetensors",
    }
    source = "digits"
    if schedule == "layer":
        source, options = "test_resnet", {**options, **DEEPER}
    if schedule == "combined":
        source = "combined.toml"
        del options["levels"], options["schedule.kind"]
    api.compress(source, options, observer=Observer())


def compare(schedule: str) -> Mapping[str, float]:
    """Return the largest differences of weights, of running statistics, and over a tensor's largest value."""
    for size in (4, 1):
        assert Processes(size, train, schedule, size).join(900) == [None] * size
    one, four = (weights(Path(f"{size}.nested.safetensors")) for size in (1, 4))
    found = {name: float((one[name] - four[name]).abs().max()) for name in one}
    return {
        "weights": max(value for name, value in found.items() if "running" not in name),
        "running statistics": max(value for name, value in found.items() if "running" in name),
        "over the largest value": max(v / (1e-6 + float(one[name].abs().max())) for name, v in found.items()),
    }


def main() -> None:
    for schedule in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            Path("combined.toml").write_text(COMBINED)
            print(schedule, {name: f"{value:.1e}" for name, value in compare(schedule).items()}, flush=True)


if __name__ == "__main__":
    main()
