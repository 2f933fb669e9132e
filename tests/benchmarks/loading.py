"""Compares loading a nested file with loading the dense checkpoint of the same model.

Prints, for random weights in the shapes of a timm model at sparsities 0.95 / 0.8 / 0:

- processor time of `nestify.load` with checked hashes, divided by that of timm.create_model plus safetensors'
  load_file plus load_state_dict for the dense checkpoint (goal: 1.5), the best of several alternating rounds;
  the time of the logits check, which a dense checkpoint does not have, is shown separately;
- memory that loading one level takes, divided by the dense size of the level (goal: 1.2): the process's own
  memory, sampled every millisecond. Pages of the mapped file, which the system can drop at any time, are
  shown separately.

    OMP_NUM_THREADS=1 python tests/benchmarks/loading.py [MODEL ...]     (default: resnet18 resnet50)
"""

import ctypes
import gc
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from file_size import describe, nested_by_magnitude
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

import nestify
from nestify.file.fingerprint import logit_fingerprint
from nestify.file.reader import open_nested_file
from nestify.file.writer import write_nested_file

SPARSITIES = (0.95, 0.8, 0.0)
ROUNDS = 7
TIME_GOAL, MEMORY_GOAL = 1.5, 1.2
MIB = 2**20


def write_files(folder: Path, architecture: str, dtype: torch.dtype) -> None:
    """Write the dense checkpoint of a model and its nested file with correct fingerprints."""
    save_file(timm.create_model(architecture).state_dict(), folder / "dense")
    state, description = nested_by_magnitude(architecture, SPARSITIES), describe(architecture, SPARSITIES)
    write_nested_file(folder / "nested", state, description, dtype)
    file = open_nested_file(folder / "nested")
    levels = [
        entry.model_copy(
            update={
                "fingerprint": logit_fingerprint(
                    nestify.load(folder / "nested", level=level, check=False),
                    file.manifest.model.preprocessing.input_size,
                )
            }
        )
        for level, entry in enumerate(description.levels, start=1)
    ]
    write_nested_file(folder / "nested", state, description.model_copy(update={"levels": levels}), dtype)


def load_dense(folder: Path, architecture: str) -> None:
    """Load the dense checkpoint."""
    timm.create_model(architecture).load_state_dict(load_file(folder / "dense"))


def seconds(call: Callable[[], object]) -> float:
    """Measure the processor time of a call, in seconds."""
    started = time.process_time()
    call()
    return time.process_time() - started


def measure_time(table: Table, folder: Path, architecture: str, dtype: torch.dtype) -> float:
    """Add one row; return the ratio of the times."""
    nested = folder / "nested"
    calls: list[Callable[[], object]] = [
        partial(load_dense, folder, architecture),
        partial(nestify.load, nested, check=False),
        partial(nestify.load, nested),
        partial(nestify.load, nested, level=3, check=False),
    ]
    rounds = [[seconds(call) for call in calls] for _ in range(ROUNDS)]
    dense, loaded, checked, one = (min(column) for column in zip(*rounds, strict=True))
    table.add_row(
        architecture,
        str(dtype).removeprefix("torch."),
        f"{1000 * dense:.0f}",
        f"{1000 * loaded:.0f}",
        f"{loaded / dense:.2f}",
        f"{one / dense:.2f}",
        f"{1000 * (checked - loaded):.0f}",
    )
    return loaded / dense


def status(field: str) -> float:
    """Return a field of this process's status, in MiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def load_and_print(path: str, level: str) -> None:
    """Load a level; print the own and the mapped memory that it takes in MiB, and its dense size in bytes."""
    nestify.load(path, level=1, check=False)  # allocates what the libraries keep
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise freed memory would be reused without being counted
    before = {field: status(field) for field in ("RssAnon", "RssFile")}
    peaks = dict(before)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            for field, peak in peaks.items():
                peaks[field] = max(peak, status(field))

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = nestify.load(path, level=level, check=False)
    done.set()
    watcher.join()
    dense = sum(tensor.nbytes for tensor in model.state_dict().values())
    print(*(peaks[field] - before[field] for field in peaks), dense)


def measure_memory(table: Table, folder: Path, architecture: str, dtype: torch.dtype) -> float:
    """Add one row per level; return the largest ratio of memory to dense size."""
    worst = 0.0
    for level in range(1, len(SPARSITIES) + 1):
        command = [sys.executable, __file__, "--load", str(folder / "nested"), str(level)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        own, mapped, dense = float(output[0]), float(output[1]), int(output[2]) / MIB
        worst = max(worst, own / dense)
        table.add_row(
            *((architecture, str(dtype).removeprefix("torch.")) if level == 1 else ("", "")),
            str(level),
            f"{dense:.1f}",
            f"{own:.1f}",
            f"{own / dense:.2f}",
            f"{mapped:.1f}",
        )
    return worst


def main(architectures: Sequence[str]) -> int:
    """Print the tables; return 1 if a goal is missed."""
    torch.set_num_threads(1)
    times = Table("model", "stored as", "dense ms", "nested ms", "ratio", "one level", "logits check ms")
    memory = Table("model", "stored as", "level", "dense MiB", "own MiB", "ratio", "mapped MiB")
    ratios: list[tuple[float, float]] = []
    for architecture in architectures:
        for dtype in (torch.float32, torch.float16):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                write_files(folder, architecture, dtype)
                time_ratio = measure_time(times, folder, architecture, dtype)
                ratios.append((time_ratio, measure_memory(memory, folder, architecture, dtype)))
    console = Console(width=110)
    for table in (times, memory):
        console.print(table)
    worst_time, worst_memory = (max(column) for column in zip(*ratios, strict=True))
    console.print(
        f"largest: time {worst_time:.2f} (goal {TIME_GOAL}), memory {worst_memory:.2f} (goal {MEMORY_GOAL})"
    )
    return int(worst_time > TIME_GOAL or worst_memory > MEMORY_GOAL)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load_and_print(*sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:] or ["resnet18", "resnet50"]))
