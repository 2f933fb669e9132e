"""Does a run that is killed repeatedly end with the same bytes? Kills real runs and compares their files.

    python tests/benchmarks/resume.py                        # 20 kills of each run
    python tests/benchmarks/resume.py --kills 100 --seed 3

Each run (digits, fine-tuned and then nested, on a few images) is first completed without interruption. Then
it is started, killed by SIGKILL at a random moment of its duration, and started again with the same
command, for the requested number of kills; then it runs to its end. A kill may happen before the training,
during a step, while a checkpoint is written, or while the nested file is written. Prints how often it was
killed, how often it resumed from a checkpoint, and whether the bytes of the nested file are those of the
uninterrupted run. Exit code 1 if they are not.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

SMALL = (
    *("digits", "--max-train", "400", "--max-val", "100", "--batch-size", "16", "--finetune-epochs", "2"),
    *("--epochs", "2.5", "--set", "train.recalibrate_batches=2", "--set", "train.checkpoint_minutes=0.001"),
)
RUNS = {
    "weights, ramp": ("--levels", "0.95,0.8,0"),
    "weights, budgets, averaged": ("--levels", "macs=0.25,macs=0.5,1", "--set", "train.ema_decay=0.9"),
    "channels, mixup, 2 workers": (
        *("--schedule", "channel", "--levels", "0.5,1", "--set", "augment.mixup=0.2", "--workers", "2"),
    ),
}


def start(words: Sequence[str], folder: Path) -> "subprocess.Popen[bytes]":
    """Start a run, which resumes if there is a checkpoint."""
    command = [sys.executable, "-m", "nestify", "compress", *SMALL, *words, "-o", "out.nested.safetensors"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    error = (folder / "errors").open("wb")
    with error:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=error,
            start_new_session=True,
        )


def finish(process: "subprocess.Popen[bytes]", folder: Path) -> bytes:
    """Wait for a run to end; return the bytes of its file."""
    if process.wait() != 0:
        raise SystemExit(f"the run failed:\n{(folder / 'errors').read_text()}")
    return (folder / "out.nested.safetensors").read_bytes()


def has_resumed(folder: Path) -> bool:
    """Return whether a run logged that it resumes."""
    return "resuming at" in (folder / "errors").read_text()


def kill_many(words: Sequence[str], kills: int, rng: random.Random, folder: Path) -> tuple[int, int, bool]:
    """Kill a run repeatedly; return the kills, how often it resumed, and whether its bytes are the same."""
    started = time.perf_counter()
    expected = finish(start(words, folder), folder)
    seconds = time.perf_counter() - started
    (folder / "out.nested.safetensors").unlink()
    done = resumed = 0
    same = True
    while done < kills:
        process = start(words, folder)
        try:
            process.wait(rng.uniform(0.3, 1.05) * seconds)
            resumed += has_resumed(folder)
            same &= finish(process, folder) == expected  # it ended before the kill; start it again
            (folder / "out.nested.safetensors").unlink()
            continue
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        done += 1
        resumed += has_resumed(folder)
    last = finish(start(words, folder), folder)
    return done, resumed + has_resumed(folder), same and last == expected


def main() -> int:
    """Print the table; return 1 if any bytes differed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=20, help="kills of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    table = Table(title="Killed and resumed")
    for heading in ("run", "kills", "resumed", "same bytes"):
        table.add_column(heading, no_wrap=True)
    all_same = True
    for name, words in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            kills, resumed, same = kill_many(words, options.kills, rng, Path(folder))
        table.add_row(name, str(kills), str(resumed), "yes" if same else "NO")
        all_same &= same
    Console().print(table)
    return int(not all_same)


if __name__ == "__main__":
    sys.exit(main())
