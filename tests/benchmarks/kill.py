"""Can a killed process leave an incomplete nested file? Kills many processes that write one.

    python tests/benchmarks/kill.py                          # 50 kills of each way of writing
    python tests/benchmarks/kill.py --kills 1000 --seed 3

Every way of writing (with and without an existing file at the path, slicing, and upgrading a slice) runs in
its own process, which is killed by SIGKILL at a random moment of its duration. Prints how often the old
file (or none) was found afterwards, how often the new file, how often an incomplete file, and how often a
hidden temporary file was left, and its size. Exit code 1 if an incomplete file was found. Requires that
processes can be forked.
"""

import argparse
import random
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own deprecation warnings on import
    import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.file.killing import Job, duration, jobs, kill_after

WEIGHTS = 2**20
MIB = 2**20


@dataclass
class Tally:
    """Results of one way of writing.

    Attributes:
        seconds: duration without a kill.
        file_bytes: size of the new file.
        old: number of kills that left the old file, or none.
        new: number of kills that left the new file.
        half: number of kills that left an incomplete file.
        left: sizes of the temporary files that were left.
    """

    seconds: float
    file_bytes: int
    old: int = 0
    new: int = 0
    half: int = 0
    left: list[int] = field(default_factory=list)


def kill_many(name: str, job: Job, path: Path, kills: int, rng: random.Random) -> Tally:
    """Kill one way of writing at moments spread over 1.1 times its duration."""
    seconds = statistics.median(duration(job, path) for _ in range(5))
    tally = Tally(seconds, len(job.new))
    for number in track(range(kills), name, console=Console(stderr=True), transient=True):
        moment = (number + rng.random()) / kills * 1.1 * seconds
        after = kill_after(job, path, moment)
        tally.old += after.found == job.old
        tally.new += after.found == job.new
        tally.half += after.found not in (job.old, job.new)
        tally.left += after.left
    return tally


def show(rows: Sequence[tuple[str, Tally]]) -> None:
    """Print the table."""
    table = Table(title="Killed while writing")
    table.add_column("way of writing", no_wrap=True)
    for heading in ("MiB", "ms", "kills", "old", "new", "half", "left", "MiB left"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, tally in rows:
        table.add_row(
            name,
            f"{tally.file_bytes / MIB:.1f}",
            f"{tally.seconds * 1000:.0f}",
            str(tally.old + tally.new + tally.half),
            str(tally.old),
            str(tally.new),
            str(tally.half),
            str(len(tally.left)),
            f"{min(tally.left) / MIB:.1f}-{max(tally.left) / MIB:.1f}" if tally.left else "",
        )
    Console().print(table)


def main() -> int:
    """Print the table; return 1 if an incomplete file was found."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=50, help="kills of each way (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        sources, out = Path(name) / "sources", Path(name) / "out"
        sources.mkdir()
        out.mkdir()
        rows = [
            (way, kill_many(way, job, out / "model.safetensors", options.kills, rng))
            for way, job in jobs(sources, WEIGHTS).items()
        ]
    show(rows)
    return int(any(tally.half for _, tally in rows))


if __name__ == "__main__":
    sys.exit(main())
