"""What does a reader do with untrusted nested files? Reads many corrupted files.

    python tests/benchmarks/fuzz.py                          # 100,000 files, about a quarter of an hour
    python tests/benchmarks/fuzz.py --count 5000 --seed 7
    python tests/benchmarks/fuzz.py --seed 7 --only 4711     # one file again, with the complete traceback

`tests/file/mutations.py` corrupts the files, `tests/file/fuzzing.py` defines what a reader may do with them.
Prints, for each kind of damage, how many files were tried, refused and read, and the largest memory that was
allocated on opening (including refused files) and on reading, in bytes per byte of the file; on reading, the
dense tensors that the file declares are added to its bytes. The first 256 KiB are not counted. Exit code 1 if
a file was handled wrongly: an exception other than nestify's own, a warning, a hang, damage that was not
noticed, too much memory.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own deprecation warnings on import
    import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.file.fuzzing import Verdict, base_files, corrupted_files, judge

GOLDEN = Path(__file__).parents[1] / "file" / "golden" / "float16.safetensors"
BATCH = 500
PROCESSES = 2


@dataclass
class Tally:
    """Results of the files with one kind of damage."""

    refused: int = 0
    read: int = 0
    opening_ratio: float = 0.0
    reading_ratio: float = 0.0

    def add(self, verdict: Verdict) -> None:
        self.refused += verdict.message is not None
        self.read += verdict.message is None
        self.opening_ratio = max(self.opening_ratio, verdict.opening_ratio)
        self.reading_ratio = max(self.reading_ratio, verdict.reading_ratio)

    def merge(self, other: "Tally") -> None:
        self.refused += other.refused
        self.read += other.read
        self.opening_ratio = max(self.opening_ratio, other.opening_ratio)
        self.reading_ratio = max(self.reading_ratio, other.reading_ratio)


@dataclass
class Batch:
    """Results of a range of files.

    Attributes:
        tallies: results by kind of damage.
        wrong: one text per file that was handled wrongly.
        peak_bytes: peak memory of the process.
    """

    tallies: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    wrong: list[str] = field(default_factory=list)
    peak_bytes: int = 0


def try_files(seed: int, numbers: range) -> Batch:
    """Read the files with these numbers."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    batch = Batch(tallies={})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = corrupted_files(base_files(folder, GOLDEN), folder, seed, numbers)
        for number, (kind, path, base, donor) in zip(numbers, files, strict=True):
            try:
                verdict = judge(path, base, donor, kind)
            except KeyboardInterrupt:
                raise
            except BaseException:
                batch.wrong.append(f"file {number}, {kind}:\n{traceback.format_exc()}")
            else:
                batch.tallies.setdefault(kind, Tally()).add(verdict)
    batch.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return batch


def _try_batch(arguments: tuple[int, range]) -> Batch:
    return try_files(*arguments)


def batches(seed: int, count: int) -> Iterator[Batch]:
    """Yield all batches, in no particular order."""
    parts = [(seed, range(first, min(first + BATCH, count))) for first in range(0, count, BATCH)]
    with multiprocessing.get_context("forkserver").Pool(PROCESSES) as pool:
        found = pool.imap_unordered(_try_batch, parts)
        yield from track(found, "reading", total=len(parts), console=Console(stderr=True), transient=True)


def show(total: Batch, seconds: float) -> None:
    """Print the table."""
    table = Table(title="Corrupted nested files")
    table.add_column("kind of damage", no_wrap=True)
    for heading in ("tried", "refused", "read", "opening: bytes / byte", "reading: bytes / byte"):
        table.add_column(heading, justify="right")
    rows = sorted(total.tallies.items())
    everything = Tally()
    for _, tally in rows:
        everything.merge(tally)
    for kind, tally in [*rows, ("all", everything)]:
        table.add_row(
            kind,
            f"{tally.refused + tally.read:,}",
            f"{tally.refused:,}",
            f"{tally.read:,}",
            f"{tally.opening_ratio:.2f}",
            f"{tally.reading_ratio:.2f}",
            end_section=kind == rows[-1][0],
        )
    console = Console()
    console.print(table)
    console.print(
        f"{len(total.wrong)} handled wrongly; {seconds:.0f} s; at most {total.peak_bytes / 2**20:.0f} MiB "
        "in a process, Python and torch included"
    )


def main() -> int:
    """Print the table; return 1 if a file was handled wrongly."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000, help="files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--only", type=int, help="number of the one file to read")
    options = parser.parse_args()
    started = time.perf_counter()
    if options.only is not None:
        found = iter([try_files(options.seed, range(options.only, options.only + 1))])
    else:
        found = batches(options.seed, options.count)
    total = Batch()
    for batch in found:
        for kind, tally in batch.tallies.items():
            total.tallies[kind].merge(tally)
        total.wrong += batch.wrong
        total.peak_bytes = max(total.peak_bytes, batch.peak_bytes)
    for wrong in total.wrong:
        print(wrong)
    show(total, time.perf_counter() - started)
    return int(bool(total.wrong))


if __name__ == "__main__":
    sys.exit(main())
