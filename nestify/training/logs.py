"""The logs of a run: `metrics.jsonl`, and on request CSV tables and TensorBoard events."""

import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from math import isfinite, isnan
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from timm.utils.summary import trim_summary, update_summary

from nestify.errors import OutputError, RecipeError
from nestify.evaluation.accuracy import Accuracy
from nestify.files import sibling
from nestify.training.observer import Moment, Observer, Phase
from nestify.training.progress import StepLog

BYTES, SECONDS = "metrics_bytes", "metrics_seconds"


class MetricsLog(Observer):
    """The log `metrics.jsonl`: one JSON line per event, flushed at once.

    Args:
        path: the file; an older file is replaced.
        log_offsets: offsets from the checkpoint of the run that resumes: the file is truncated there, and
            continued. None or empty for a new run.

    Raises:
        OutputError: if the file cannot be written.
    """

    def __init__(self, path: Path, log_offsets: Mapping[str, float] | None = None) -> None:
        self.path = path
        log_offsets = log_offsets or {}
        self._start = time.perf_counter() - log_offsets.get(SECONDS, 0.0)
        try:
            self._file = open_truncated(path, int(log_offsets.get(BYTES, 0)))
        except OSError as error:
            raise self._write_error(error) from error

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """Write a line when an epoch has ended."""
        if log.epoch_ended:
            self._write({"event": phase, **asdict(log)})

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Accuracy]) -> None:
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
        return {BYTES: self._file.tell(), SECONDS: self._seconds()}

    def _seconds(self) -> float:
        return round(time.perf_counter() - self._start, 3)

    def _write(self, record: dict[str, Any]) -> None:
        record["seconds"] = self._seconds()
        try:
            self._file.write(json.dumps(_replace_non_finite(record)) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._write_error(error) from error

    def _write_error(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path} cannot be written: {error.strerror or error}; choose another --output"
        )


def open_truncated(path: Path, size: int) -> TextIO:
    """Open a text file for appending, truncated to its first `size` bytes if it is longer.

    Raises:
        OSError: if the file cannot be opened.
    """
    file = path.open("a", encoding="utf-8")
    file.truncate(min(size, path.stat().st_size))
    file.seek(0, os.SEEK_END)
    return file


def _replace_non_finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    return [_replace_non_finite(item) for item in value] if isinstance(value, list) else value


_EPOCH = "csv_epoch"
_STEP = "tensorboard_step"


class CsvLog(Observer):
    """The tables `NAME.csv` and, for the fine-tuning, `NAME.finetune.csv`: one row per epoch.

    timm's own writer writes them. The columns are those of timm's training script with the level at the end:
    `train_loss_1`, `eval_top1_3`. The training loss is NaN for levels that were not sampled, and the `eval_`
    cells are empty for levels that were not validated.

    Args:
        path: path of the training's table.
        log_offsets: offsets from the checkpoint of the run that resumes, whose tables are continued. If
            empty, older files are replaced.

    Raises:
        OutputError: if a table cannot be written.
    """

    def __init__(self, path: Path, log_offsets: Mapping[str, float]) -> None:
        self._paths: dict[Phase, Path] = {"train": path, "finetune": path.with_suffix(".finetune.csv")}
        self._written = {phase: int(log_offsets.get(f"{_EPOCH}_{phase}", 0)) for phase in self._paths}
        self._row: tuple[Phase, StepLog] | None = None
        for phase, epoch in self._written.items():
            try:
                trim_summary(str(self._paths[phase]), epoch + 1 if epoch else 0)
            except (OSError, ValueError) as error:  # ValueError: the file is not a table of this kind
                raise self._write_error(self._paths[phase], error) from error

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """Keep the row of a finished epoch until its validation accuracy is known."""
        if log.epoch_ended:
            self._flush()
            self._row = phase, log

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Accuracy]) -> None:
        """Write the row of the last epoch, with its validation accuracy."""
        if moment in ("epoch", "after"):
            self._flush(results)

    def log_offsets(self) -> dict[str, float]:
        """Return the number of the last epoch written to each table."""
        self._flush()
        return {f"{_EPOCH}_{phase}": epoch for phase, epoch in self._written.items()}

    def close(self) -> None:
        """Write the last row, if it is not written yet."""
        self._flush()

    def _flush(self, results: Sequence[Accuracy] = ()) -> None:
        if self._row is None:
            return
        (phase, log), self._row = self._row, None
        values = {"loss": log.losses, "top1": log.top1, "sparsity": log.sparsity}
        trained = {f"{name}_{k}": v for name, row in values.items() for k, v in enumerate(row, start=1)}
        levels = range(1, len(log.losses) + 1) if phase == "train" else ()
        found = {result.level: result for result in results}
        validated = {
            f"{name}_{k}": getattr(found[k], name) if k in found else ""
            for name in ("top1", "top5", "loss")
            for k in levels
        }
        path = self._paths[phase]
        try:
            update_summary(log.epoch, trained, validated, str(path), lr=log.lr)
        except OSError as error:
            raise self._write_error(path, error) from error
        self._written[phase] = log.epoch

    def _write_error(self, path: Path, error: Exception) -> OutputError:
        reason = getattr(error, "strerror", None) or "it exists and is not a log of a run"
        return OutputError(
            f"{path} cannot be written ({reason}); choose another --output or leave out --log csv"
        )


class TensorBoardLog(Observer):
    """TensorBoard events in the folder `NAME.tensorboard`.

    Args:
        folder: folder of the events; events of an older run in it are removed.
        log_offsets: offsets from the checkpoint of the run that resumes, whose events are continued. Empty
            for a new run.
        finetune_steps: steps of the fine-tuning; the steps of the training are counted from there.

    Raises:
        RecipeError: if TensorBoard is not installed.
        OutputError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, log_offsets: Mapping[str, float], finetune_steps: int) -> None:
        self._first_step: dict[Phase, int] = {"finetune": 0, "train": finetune_steps}
        self._step = int(log_offsets.get(_STEP, 0))
        try:
            if not self._step:
                for old in folder.glob("events.out.tfevents.*"):
                    old.unlink()
            self._writer = _summary_writer()(str(folder), purge_step=self._step + 1 if self._step else None)
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be written ({error.strerror or error}); choose another --output or leave "
                "out --log tensorboard"
            ) from error

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """Add the losses, training accuracies and sparsities of the levels, and the learning rate."""
        self._step = self._first_step[phase] + log.step
        self._add(phase, {"loss": log.losses, "top1": log.top1, "sparsity": log.sparsity})
        self._writer.add_scalar(f"{phase}/lr", log.lr, self._step)

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Accuracy]) -> None:
        """Add the accuracies and losses of the levels on the validation images."""
        if moment in ("epoch", "after"):
            rows = {name: [getattr(result, name) for result in results] for name in ("top1", "top5", "loss")}
            self._add("validation", rows)
            self._writer.flush()

    def log_offsets(self) -> dict[str, float]:
        """Return the last step that was logged."""
        self._writer.flush()
        return {_STEP: self._step}

    def close(self) -> None:
        """Write the remaining events, and close the file."""
        self._writer.close()

    def _add(self, group: str, rows: Mapping[str, Sequence[float]]) -> None:
        for name, row in rows.items():
            for k, value in enumerate(row, start=1):
                if not isnan(value):  # a level that was not sampled
                    self._writer.add_scalar(f"{group}/{name}/level{k}", value, self._step)


def check_logs(names: Sequence[str]) -> None:
    """Check, before any work is done, that the packages of all requested logs are installed.

    Raises:
        RecipeError: if TensorBoard is requested and not installed.
    """
    if "tensorboard" in names:
        _summary_writer()


@contextmanager
def open_logs(
    names: Sequence[str], output: Path, log_offsets: Mapping[str, float], finetune_steps: int
) -> Iterator[list[Observer]]:
    """Open the logs that a recipe requests, next to its output; they are closed at the end of the block.

    Args:
        names: the requested logs: `csv`, `tensorboard`.
        output: path of the nested file.
        log_offsets: offsets from the checkpoint of the run that resumes, whose logs are continued. Empty for
            a new run.
        finetune_steps: steps of the fine-tuning.
    """
    with ExitStack() as opened:
        logs: list[Observer] = []
        if "csv" in names:
            table = CsvLog(sibling(output, ".csv"), log_offsets)
            logs.append(opened.enter_context(closing(table)))
        if "tensorboard" in names:
            board = TensorBoardLog(sibling(output, ".tensorboard"), log_offsets, finetune_steps)
            logs.append(opened.enter_context(closing(board)))
        yield logs


def _summary_writer() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations within TensorBoard
            from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RecipeError(
            "train.log: tensorboard is not installed; pip install 'nestify[tensorboard]', or use --log csv"
        ) from error
    return SummaryWriter
