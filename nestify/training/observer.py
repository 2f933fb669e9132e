"""Who watches a run: the terminal, a log file, or nobody."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from nestify.errors import OutputError
from nestify.evaluation.accuracy import Accuracy
from nestify.schedule.costs import Plan
from nestify.training.progress import StepLog

Phase = Literal["finetune", "train"]
Moment = Literal["original", "before", "epoch", "after"]


BYTES, SECONDS = "metrics_bytes", "metrics_seconds"


class Observer:
    """Told of everything that happens in a run; this one does nothing."""

    def stage(self, text: str) -> None:
        """A part of the run begins, such as "reading images"."""

    def planned(self, plan: Plan) -> None:
        """The plan stands; work begins after this."""

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """Some training steps were done."""

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Accuracy]) -> None:
        """Levels were evaluated on the validation images, core first."""

    def skipped(self, split: str, images: dict[str, str]) -> None:
        """Images of a split could not be read: why, by file name."""

    def warned(self, text: str) -> None:
        """Something is wrong that does not end the run."""

    def marks(self) -> dict[str, float]:
        """How far it has got, by names of its own: kept in checkpoints, given to the one that goes on."""
        return {}


class Observers(Observer):
    """Tells several observers."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def stage(self, text: str) -> None:
        """Pass on."""
        for observer in self.observers:
            observer.stage(text)

    def planned(self, plan: Plan) -> None:
        """Pass on."""
        for observer in self.observers:
            observer.planned(plan)

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """Pass on."""
        for observer in self.observers:
            observer.stepped(phase, log)

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Accuracy]) -> None:
        """Pass on."""
        for observer in self.observers:
            observer.evaluated(moment, epoch, results)

    def skipped(self, split: str, images: dict[str, str]) -> None:
        """Pass on."""
        for observer in self.observers:
            observer.skipped(split, images)

    def warned(self, text: str) -> None:
        """Pass on."""
        for observer in self.observers:
            observer.warned(text)

    def marks(self) -> dict[str, float]:
        """Those of all."""
        return {name: mark for observer in self.observers for name, mark in observer.marks().items()}


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
