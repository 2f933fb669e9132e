"""Further logs of a training, beside `metrics.jsonl`: a table (CSV), and TensorBoard."""

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
from nestify.files import beside
from nestify.training.observer import Moment, Observer, Phase
from nestify.training.progress import StepLog

BYTES, SECONDS = "metrics_bytes", "metrics_seconds"


class MetricsLog(Observer):
    """`metrics.jsonl`: one JSON line per epoch and per evaluation, written as it happens.

    Args:
        path: the file; an older one is replaced.
        marks: of the log of an earlier part of the run; that file is cut where the mark is, and continued.

    Raises:
        OutputError: if it cannot be written.
    """

    def __init__(self, path: Path, marks: Mapping[str, float] | None = None) -> None:
        self.path = path
        marks = marks or {}
        self._start = time.perf_counter() - marks.get(SECONDS, 0.0)
        try:
            self._file = open_at(path, int(marks.get(BYTES, 0)))
        except OSError as error:
            raise self._refused(error) from error

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """A line per finished epoch."""
        if log.epoch_ended:
            self._write({"event": phase, **asdict(log)})

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Accuracy]) -> None:
        """A line per evaluation."""
        levels = [asdict(result) for result in results]
        self._write({"event": "evaluation", "moment": moment, "epoch": epoch, "levels": levels})

    def skipped(self, split: str, images: dict[str, str]) -> None:
        """A line per split that lost images."""
        if images:
            self._write({"event": "skipped", "split": split, "images": images})

    def warned(self, text: str) -> None:
        """A line."""
        self._write({"event": "warning", "text": text})

    def marks(self) -> dict[str, float]:
        """Where the file ends, and the seconds since the run began."""
        return {BYTES: self._file.tell(), SECONDS: self._seconds()}

    def _seconds(self) -> float:
        return round(time.perf_counter() - self._start, 3)

    def _write(self, record: dict[str, Any]) -> None:
        record["seconds"] = self._seconds()
        try:
            self._file.write(json.dumps(_finite(record)) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path} cannot be written: {error.strerror or error}; choose another --output"
        )


def open_at(path: Path, size: int) -> TextIO:
    """Open a text file to be continued after its first `size` bytes, or where it ends if that is before.

    Raises:
        OSError: if it cannot be opened.
    """
    file = path.open("a", encoding="utf-8")
    file.truncate(min(size, path.stat().st_size))
    file.seek(0, os.SEEK_END)
    return file


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


_EPOCH = "csv_epoch"
_STEP = "tensorboard_step"


class CsvLog(Observer):
    """A row per epoch by timm's own writer, `NAME.csv`; one of the fine-tuning is `NAME.finetune.csv`.

    The columns are those of timm's training script with the level at the end: `train_loss_1`, `eval_top1_3`.
    Cells are empty where a level was not sampled or not validated.

    Args:
        path: of the table of the training.
        marks: of the log of an earlier part of the run, which is continued; else older files are replaced.

    Raises:
        OutputError: if it cannot be written.
    """

    def __init__(self, path: Path, marks: Mapping[str, float]) -> None:
        self._paths: dict[Phase, Path] = {"train": path, "finetune": path.with_suffix(".finetune.csv")}
        self._written = {phase: int(marks.get(f"{_EPOCH}_{phase}", 0)) for phase in self._paths}
        self._row: tuple[Phase, StepLog] | None = None
        for phase, epoch in self._written.items():
            try:
                trim_summary(str(self._paths[phase]), epoch + 1 if epoch else 0)
            except (OSError, ValueError) as error:  # ValueError: something else than such a table
                raise self._refused(self._paths[phase], error) from error

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """Hold the row of a finished epoch back until its validation is known."""
        if log.epoch_ended:
            self._flush()
            self._row = phase, log

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Accuracy]) -> None:
        """Write the row with its validation."""
        if moment in ("epoch", "after"):
            self._flush(results)

    def marks(self) -> dict[str, float]:
        """The epochs that rows were written of."""
        self._flush()
        return {f"{_EPOCH}_{phase}": epoch for phase, epoch in self._written.items()}

    def close(self) -> None:
        """Write what is left."""
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
            raise self._refused(path, error) from error
        self._written[phase] = log.epoch

    def _refused(self, path: Path, error: Exception) -> OutputError:
        reason = getattr(error, "strerror", None) or "it is no table of a run"
        return OutputError(
            f"{path} cannot be written ({reason}); choose another --output or leave out --log csv"
        )


class TensorBoardLog(Observer):
    """Events for TensorBoard in the folder `NAME.tensorboard`.

    Args:
        folder: for the events; those of an older run in it are removed.
        marks: of the log of an earlier part of the run, which is continued.
        finetune_steps: of the run; the steps of the training are counted on from there.

    Raises:
        RecipeError: if TensorBoard is not installed.
        OutputError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, marks: Mapping[str, float], finetune_steps: int) -> None:
        self._first: dict[Phase, int] = {"finetune": 0, "train": finetune_steps}
        self._step = int(marks.get(_STEP, 0))
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
        """Losses, accuracies on training images and sparsities of the levels, and the learning rate."""
        self._step = self._first[phase] + log.step
        self._add(phase, {"loss": log.losses, "top1": log.top1, "sparsity": log.sparsity})
        self._writer.add_scalar(f"{phase}/lr", log.lr, self._step)

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Accuracy]) -> None:
        """Accuracy and loss of the levels on the validation images."""
        if moment in ("epoch", "after"):
            rows = {name: [getattr(result, name) for result in results] for name in ("top1", "top5", "loss")}
            self._add("validation", rows)
            self._writer.flush()

    def marks(self) -> dict[str, float]:
        """The last step that was told of."""
        self._writer.flush()
        return {_STEP: self._step}

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()

    def _add(self, group: str, rows: Mapping[str, Sequence[float]]) -> None:
        for name, row in rows.items():
            for k, value in enumerate(row, start=1):
                if not isnan(value):  # a level that was not sampled
                    self._writer.add_scalar(f"{group}/{name}/level{k}", value, self._step)


def check_logs(names: Sequence[str]) -> None:
    """Refuse, before any work is done, a log that cannot be written.

    Raises:
        RecipeError: if TensorBoard is asked for and not installed.
    """
    if "tensorboard" in names:
        _summary_writer()


@contextmanager
def open_logs(
    names: Sequence[str], output: Path, marks: Mapping[str, float], finetune_steps: int
) -> Iterator[list[Observer]]:
    """The logs that a recipe asks for, beside its output.

    Args:
        names: `csv`, `tensorboard`. `output`: path of the nested file.
        marks: of the logs of an earlier part of the run, which are continued; empty where there is none.
        finetune_steps: of the run.
    """
    with ExitStack() as opened:
        logs: list[Observer] = []
        if "csv" in names:
            table = CsvLog(beside(output, ".csv"), marks)
            logs.append(opened.enter_context(closing(table)))
        if "tensorboard" in names:
            board = TensorBoardLog(beside(output, ".tensorboard"), marks, finetune_steps)
            logs.append(opened.enter_context(closing(board)))
        yield logs


def _summary_writer() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations within TensorBoard
            from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RecipeError(
            "train.log: tensorboard is not installed; pip install 'nestify[tensorboard]', or log csv"
        ) from error
    return SummaryWriter
