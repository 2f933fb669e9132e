"""Who watches a run: the terminal, a log file, or nobody."""

from collections.abc import Sequence
from typing import Literal

from nestify.evaluation.accuracy import Accuracy
from nestify.schedule.costs import Plan
from nestify.training.progress import StepLog

Phase = Literal["finetune", "train"]
Moment = Literal["original", "before", "epoch", "after"]


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
