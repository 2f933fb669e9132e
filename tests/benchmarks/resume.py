"""Does a run that is killed again and again end with the same bytes? Kills a real one, and looks.

    python tests/benchmarks/resume.py                        # 20 kills of each run
    python tests/benchmarks/resume.py --kills 100 --seed 3

Each run (digits, fine-tuned and then nested, on a few images) is done once in peace. Then it is started,
killed by SIGKILL at a random moment of the time that it takes, and started again with the same command, until
it was killed often enough; at last it may end. A kill may come before the training, in a step, while a
checkpoint is written, while the nested file is written. Prints how often it was killed, how often it went on
from a checkpoint, and whether the bytes of the nested file are those of the run in peace. Exit code 1 if they
are not.
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
    """Begin a run, or go on with it."""
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
    """Wait for a run; the bytes of its file."""
    if process.wait() != 0:
        raise SystemExit(f"the run failed:\n{(folder / 'errors').read_text()}")
    return (folder / "out.nested.safetensors").read_bytes()


def went_on(folder: Path) -> bool:
    """Whether a run said that it goes on."""
    return "resuming at" in (folder / "errors").read_text()


def kill_many(words: Sequence[str], kills: int, rng: random.Random, folder: Path) -> tuple[int, int, bool]:
    """Kill a run as often as asked; the kills, how often it went on, and whether its bytes are the same."""
    begun = time.perf_counter()
    whole = finish(start(words, folder), folder)
    seconds = time.perf_counter() - begun
    (folder / "out.nested.safetensors").unlink()
    done = resumed = 0
    same = True
    while done < kills:
        process = start(words, folder)
        try:
            process.wait(rng.uniform(0.3, 1.05) * seconds)
            resumed += went_on(folder)
            same &= finish(process, folder) == whole  # it was faster than the kill; another one begins
            (folder / "out.nested.safetensors").unlink()
            continue
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        done += 1
        resumed += went_on(folder)
    last = finish(start(words, folder), folder)
    return done, resumed + went_on(folder), same and last == whole


def main() -> int:
    """Print the table; 1 if bytes ever differed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=20, help="of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    table = Table(title="Killed and gone on")
    for heading in ("run", "kills", "went on", "same bytes"):
        table.add_column(heading, no_wrap=True)
    fine = True
    for name, words in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            kills, resumed, same = kill_many(words, options.kills, rng, Path(folder))
        table.add_row(name, str(kills), str(resumed), "yes" if same else "NO")
        fine &= same
    Console().print(table)
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
