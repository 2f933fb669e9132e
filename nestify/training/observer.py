"""Observers of a run, such as the terminal and the log files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nestify.evaluation.measure import Score
from nestify.schedule.costs import Plan
from nestify.training.progress import StepLog

Phase = Literal["finetune", "train"]
Moment = Literal["original", "before", "epoch", "after"]


@dataclass(frozen=True)
class Trial:
    """A short training.

    Attributes:
        lr: learning rate.
        steps: number of steps.
        loss: joint loss of the levels afterwards, on held-back training images; infinite if it diverged.
    """

    lr: float
    steps: int
    loss: float


@dataclass(frozen=True)
class RateSearch:
    """The result of a search.

    Attributes:
        lr: the chosen learning rate.
        start: loss without training; NaN if nothing was tried.
        trials: the short trainings, in their order.
        best: the short training with the lowest loss, from which `lr` follows; None if `lr` is the default.
        problem: why `lr` is the default rate, as a main clause; empty if the search chose it.
    """

    lr: float
    start: float
    trials: Sequence[Trial]
    best: Trial | None = None
    problem: str = ""


class Observer:
    """Receives the events of a run; this class ignores them, and subclasses override what they need."""

    def stage(self, text: str) -> None:
        """Handle the start of a part of the run, such as "reading images"."""

    def planned(self, plan: Plan) -> None:
        """Handle the plan of the run, before its work starts."""

    def searched(self, phase: Phase, search: RateSearch) -> None:
        """Handle the search for the learning rate of a training."""

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """Handle the log of some training steps, or of a finished epoch."""

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Score]) -> None:
        """Handle an evaluation on the validation images.

        Args:
            moment: the model or the time of the evaluation.
            epoch: number of finished epochs of the training.
            results: accuracies of the levels, core first, or agreements without labels; of the dense model
                for `original`.
        """

    def skipped(self, split: str, images: dict[str, str]) -> None:
        """Handle the images of a split that could not be read.

        Args:
            split: `training` or `validation`.
            images: reason by file name; empty if all images were read.
        """

    def warned(self, text: str) -> None:
        """Handle a warning about a problem that does not end the run."""

    def written(self, files: Sequence[Path]) -> None:
        """Handle the files that a run has written, when it is done.

        Args:
            files: the nested file, and its report as a page.
        """

    def tracker_runs(self) -> dict[str, str]:
        """Return the runs of experiment trackers, by tracker; checkpoints save them for resuming."""
        return {}

    def log_offsets(self) -> dict[str, float]:
        """Return the positions up to which logs are written; checkpoints save them for resuming.

        Returns:
            Positions (bytes, epochs, steps, seconds) by a name that no other observer uses.
        """
        return {}


class Observers(Observer):
    """Forwards every event to several observers."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def stage(self, text: str) -> None:
        """Forward to all observers."""
        for observer in self.observers:
            observer.stage(text)

    def planned(self, plan: Plan) -> None:
        """Forward to all observers."""
        for observer in self.observers:
            observer.planned(plan)

    def searched(self, phase: Phase, search: RateSearch) -> None:
        """Forward to all observers."""
        for observer in self.observers:
            observer.searched(phase, search)

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """Forward to all observers."""
        for observer in self.observers:
            observer.stepped(phase, log)

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Score]) -> None:
        """Forward to all observers."""
        for observer in self.observers:
            observer.evaluated(moment, epoch, results)

    def skipped(self, split: str, images: dict[str, str]) -> None:
        """Forward to all observers."""
        for observer in self.observers:
            observer.skipped(split, images)

    def warned(self, text: str) -> None:
        """Forward to all observers."""
        for observer in self.observers:
            observer.warned(text)

    def written(self, files: Sequence[Path]) -> None:
        """Forward to all observers."""
        for observer in self.observers:
            observer.written(files)

    def tracker_runs(self) -> dict[str, str]:
        """Return the runs of all observers."""
        return {name: run for observer in self.observers for name, run in observer.tracker_runs().items()}

    def log_offsets(self) -> dict[str, float]:
        """Return the offsets of all observers."""
        return {
            name: offset for observer in self.observers for name, offset in observer.log_offsets().items()
        }
