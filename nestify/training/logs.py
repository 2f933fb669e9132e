"""The logs of a run: `metrics.jsonl`, and on request CSV tables.

TensorBoard events are in `tensorboard`, experiment trackers in `trackers`.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, fields
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from timm.utils.summary import trim_summary, update_summary

from nestify.addresses import hide_passwords
from nestify.errors import OutputError
from nestify.evaluation.measure import Score
from nestify.files import sibling
from nestify.text import without_non_finite
from nestify.training.observer import Moment, Observer, Phase, RateSearch
from nestify.training.progress import StepLog
from nestify.training.tensorboard import TensorBoardLog, summary_writer
from nestify.training.tracker_runs import TrackedRun
from nestify.training.trackers import TRACKERS, TrackerLog, check_tracker, tracked_options

BYTES, SECONDS = "metrics_bytes", "metrics_seconds"


class MetricsLog(Observer):
    """The log `metrics.jsonl`: one JSON line per event, written at once.

    A line that cannot be written, as on a full disk, is kept and written with the next one.

    Args:
        path: the file; an older file is replaced.
        log_offsets: offsets from the checkpoint of the run that resumes: the file is truncated there, and
            continued. None or empty for a new run.
        warn: receives a warning when lines cannot be written.

    Raises:
        OutputError: if the file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        log_offsets: Mapping[str, float] | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.path = path
        self._warn = warn
        self._waiting: list[bytes] = []
        log_offsets = log_offsets or {}
        self._start = time.perf_counter() - log_offsets.get(SECONDS, 0.0)
        try:
            self._file = open_truncated(path, int(log_offsets.get(BYTES, 0)))
            self._size = self._file.tell()
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error.strerror or error}; choose another --output"
            ) from error

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._waiting and not self._write_waiting():
            self._warn(f"{self.path}: the last {len(self._waiting)} lines of the log are missing")
        with suppress(OSError):
            self._file.close()

    def searched(self, phase: Phase, search: RateSearch) -> None:
        """Write a line with the rates that were tried, and their losses."""
        self._write({"event": "lr_search", "phase": phase, **asdict(search)})

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """Write a line when an epoch has ended."""
        if log.epoch_ended:
            values = {field.name: getattr(log, field.name) for field in fields(log)}
            del values["images_before"]  # a run that was interrupted writes the same lines
            metric, scores = values.pop("metric"), values.pop("scores")
            self._write({"event": phase, **values, **({metric.key: scores} if scores else {})})

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Score]) -> None:
        """Write a line for an evaluation."""
        levels = [asdict(result) for result in results]
        self._write({"event": "evaluation", "moment": moment, "epoch": epoch, "levels": levels})

    def skipped(self, split: str, images: dict[str, str]) -> None:
        """Write a line if images of the split could not be read."""
        if images:
            self._write({"event": "skipped", "split": split, "images": images})

    def warned(self, text: str) -> None:
        """Write a line for a warning."""
        self._write({"event": "warning", "text": text})

    def log_offsets(self) -> dict[str, float]:
        """Return the size of the file in bytes, and the seconds since the run began."""
        return {BYTES: self._size, SECONDS: self._seconds()}

    def _seconds(self) -> float:
        return round(time.perf_counter() - self._start, 3)

    def _write(self, record: dict[str, Any]) -> None:
        record["seconds"] = self._seconds()
        failed_before = bool(self._waiting)
        line = hide_passwords(json.dumps(without_non_finite(record)))
        self._waiting.append(f"{line}\n".encode())
        self._write_waiting(warn=not failed_before)

    def _write_waiting(self, *, warn: bool = False) -> bool:
        """Write the lines that wait, all or none; return whether that succeeded."""
        rest = memoryview(b"".join(self._waiting))
        size = self._size + len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._size)
            if warn:
                reason = error.strerror or error
                self._warn(f"{self.path} cannot be written ({reason}); the run continues, and tries again")
            return False
        self._size = size
        self._waiting.clear()
        return True


def open_truncated(path: Path, size: int) -> FileIO:
    """Open a file for appending without a buffer, truncated to its first `size` bytes if it is longer.

    Raises:
        OSError: if the file cannot be opened.
    """
    file = path.open("ab", buffering=0)
    file.truncate(min(size, path.stat().st_size))
    file.seek(0, os.SEEK_END)
    return file


_EPOCH = "csv_epoch"

_HEADER = "epoch,train_"
"""How the first line of a table of timm's writer begins."""


class _Row(NamedTuple):
    """A row of a table: one epoch, with its values by column."""

    phase: Phase
    epoch: int
    trained: dict[str, Any]
    validated: dict[str, Any]
    lr: float


class CsvLog(Observer):
    """The tables `NAME.csv` and, for the fine-tuning, `NAME.finetune.csv`: one row per epoch.

    timm's own writer writes them. The columns are those of timm's training script with the level at the end:
    `train_loss_1`, `eval_top1_3`. The training loss is NaN for levels that were not sampled, and the `eval_`
    cells are empty for levels that were not validated. A row that cannot be written, as on a full disk, is
    kept and written with the next one.

    Args:
        path: path of the training's table.
        log_offsets: offsets from the checkpoint of the run that resumes, whose tables are continued. If
            empty, older files are replaced.
        warn: receives a warning when rows cannot be written.

    Raises:
        OutputError: if a table cannot be opened.
    """

    def __init__(
        self, path: Path, log_offsets: Mapping[str, float], warn: Callable[[str], None] = lambda text: None
    ) -> None:
        self._warn = warn
        self._waiting: list[_Row] = []
        self._paths: dict[Phase, Path] = {"train": path, "finetune": path.with_suffix(".finetune.csv")}
        self._written = {phase: int(log_offsets.get(f"{_EPOCH}_{phase}", 0)) for phase in self._paths}
        self._row: tuple[Phase, StepLog] | None = None
        for phase, epoch in self._written.items():
            try:
                _check_table(self._paths[phase])
                trim_summary(str(self._paths[phase]), epoch + 1 if epoch else 0)
            except (OSError, ValueError) as error:  # ValueError: the file is not a table of this kind
                raise self._write_error(self._paths[phase], error) from error

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """Keep the row of a finished epoch until its validation accuracy is known."""
        if log.epoch_ended:
            self._flush()
            self._row = phase, log

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Score]) -> None:
        """Write the row of the last epoch, with its validation accuracy."""
        if moment in ("epoch", "after"):
            self._flush(results)

    def log_offsets(self) -> dict[str, float]:
        """Return the number of the last epoch written to each table."""
        self._flush()
        return {f"{_EPOCH}_{phase}": epoch for phase, epoch in self._written.items()}

    def close(self) -> None:
        """Write the last rows, if they are not written yet."""
        self._flush()
        self._write_waiting()
        if self._waiting:
            self._warn(f"{self._paths['train']}: the last {len(self._waiting)} rows are missing")

    def _flush(self, results: Sequence[Score] = ()) -> None:
        if self._row is None:
            return
        (phase, log), self._row = self._row, None
        trained = {f"{name}_{k}": v for name, row in log.rows.items() for k, v in enumerate(row, start=1)}
        levels = range(1, len(log.losses) + 1) if phase == "train" else ()
        found = {result.level: result for result in results}
        validated = {
            f"{name}_{k}": getattr(found[k], name) if k in found else ""
            for name in log.metric.values
            for k in levels
        }
        self._waiting.append(_Row(phase, log.epoch, trained, validated, log.lr))
        self._write_waiting(warn=len(self._waiting) == 1)

    def _write_waiting(self, *, warn: bool = False) -> None:
        """Write the rows that wait, each completely or not at all."""
        while self._waiting:
            row = self._waiting[0]
            path = self._paths[row.phase]
            size = path.stat().st_size if path.exists() else 0
            try:
                update_summary(row.epoch, row.trained, row.validated, str(path), lr=row.lr)
            except OSError as error:
                with suppress(OSError):
                    os.truncate(path, size)
                if warn:
                    reason = error.strerror or error
                    self._warn(f"{path} cannot be written ({reason}); the run continues, and tries again")
                return
            self._written[row.phase] = row.epoch
            del self._waiting[0]

    def _write_error(self, path: Path, error: Exception) -> OutputError:
        reason = getattr(error, "strerror", None) or "it exists and is not a log of a run"
        return OutputError(
            f"{path} cannot be written ({reason}); choose another --output or leave out --log csv"
        )


def _check_table(path: Path) -> None:
    """Check that a table, if there is one, was written by a run.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it has another header.
    """
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:  # UnicodeDecodeError is a ValueError
            header = file.readline(len(_HEADER) + 1)
        if header and not header.startswith(_HEADER):
            raise ValueError


def check_logs(names: Sequence[str]) -> None:
    """Check, before any work is done, that the packages of all requested logs are installed.

    Raises:
        RecipeError: if one is not installed, or W&B has no key.
    """
    if "tensorboard" in names:
        summary_writer()
    for name in TRACKERS:
        if name in names:
            check_tracker(name)


@contextmanager
def open_logs(
    names: Sequence[str],
    output: Path,
    log_offsets: Mapping[str, float],
    finetune_steps: int,
    warn: Callable[[str], None] = lambda text: None,
    *,
    options: Mapping[str, Any],
    tracker_runs: Mapping[str, str],
) -> Iterator[list[Observer]]:
    """Open the logs that a recipe requests, next to its output; they are closed at the end of the block.

    Args:
        names: the requested logs: `csv`, `tensorboard`, `wandb`, `mlflow`.
        output: path of the nested file.
        log_offsets: offsets from the checkpoint of the run that resumes, whose logs are continued. Empty for
            a new run.
        finetune_steps: steps of the fine-tuning.
        warn: receives a warning when a log cannot be written.
        options: the recipe's options by dotted key, for trackers.
        tracker_runs: runs of trackers from the checkpoint, which are continued.
    """
    with ExitStack() as opened:
        logs: list[Observer] = []
        if "csv" in names:
            table = CsvLog(sibling(output, ".csv"), log_offsets, warn)
            logs.append(opened.enter_context(closing(table)))
        if "tensorboard" in names:
            board = TensorBoardLog(sibling(output, ".tensorboard"), log_offsets, finetune_steps, warn)
            logs.append(opened.enter_context(closing(board)))
        for name in TRACKERS:
            if name in names:
                run = TrackedRun(output, tracked_options(options), tracker_runs.get(name))
                logs.append(opened.enter_context(TrackerLog(name, run, finetune_steps, warn)))
        yield logs
