"""Progress of a run on standard error."""

import sys
import time
from collections.abc import Iterable, Sequence
from math import isnan
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from nestify.evaluation.measure import Score
from nestify.recipe.flags import name_flags
from nestify.recipe.metric import TOP1
from nestify.recipe.recipe import Recipe
from nestify.report.plan import plan_text
from nestify.report.table import summarize_images
from nestify.schedule.costs import Plan
from nestify.terminal import Caller, can_show_bars, find_caller, print_stderr
from nestify.text import LONGEST_MESSAGE, printable
from nestify.training.observer import Moment, Observer, Phase, RateSearch
from nestify.training.progress import StepLog

SECONDS_BETWEEN_LINES = 10.0
"""Seconds between lines within an epoch, if verbose and without a bar."""


class Display(Observer):
    """Progress of a run on standard error, or in a notebook.

    At a terminal it is a bar, also in a notebook if ipywidgets is installed; elsewhere it is a line per
    epoch.

    Args:
        quiet: whether to print warnings only.
        verbose: whether to print lines within epochs too, where there is no bar.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self._quiet = quiet
        self._verbose = verbose
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._has_bars = can_show_bars(self.console)
        self.progress = _BarAndDetail(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self._has_bars,
        )
        self.warnings: list[str] = []
        self._bars: dict[str, TaskID] = {}
        self._epoch_start = self._last_line = time.perf_counter()

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def stage(self, text: str) -> None:
        """Print the name of the stage."""
        self._epoch_start = time.perf_counter()
        self._print_progress(printable(text))

    def planned(self, plan: Plan) -> None:
        """Print the plan."""
        self._print_progress(plan_text(plan, sys.stderr))

    def searched(self, phase: Phase, search: RateSearch) -> None:
        """Print the chosen learning rate, and the losses by which it was chosen."""
        rounds: dict[int, list[str]] = {}
        for trial in search.trials:
            rounds.setdefault(trial.steps, []).append(f"{trial.loss:.3f} at {trial.lr:g}")
        losses = [f"loss {search.start:.3f} without training"]
        losses += [f"after {steps} steps {', '.join(texts)}" for steps, texts in rounds.items()]
        if rounds:
            self._print_progress(f"short trainings: {'; '.join(losses)}")
        if search.best is not None:
            best, steps = search.best.lr, search.best.steps
            self._print_progress(f"{phase}.lr = {search.lr:g}, from {best:g}, the best for {steps} steps")

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """Move the bar; print a line at the end of an epoch, and in between where one is due."""
        seconds = time.perf_counter() - self._epoch_start
        speed = f"{(log.images - log.images_before) / seconds:.0f} images/s" if seconds else ""
        score = f"{log.metric.title} {_join(log.scores, '.1f')}  " if log.scores else ""
        detail = f"loss {_join(log.losses, '.3f')}  {score}{speed}"
        if phase not in self._bars:
            self._bars[phase] = self.progress.add_task(phase, total=log.total_steps, detail="")
        self.progress.update(self._bars[phase], completed=log.step, detail=detail)
        if log.step == log.total_steps:
            self.progress.remove_task(self._bars.pop(phase))
        if log.epoch_ended or self._is_line_due():
            self._print_progress(f"{phase} epoch {log.epoch} ({log.step}/{log.total_steps} steps): {detail}")
        if log.epoch_ended:
            self._epoch_start = time.perf_counter()

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Score]) -> None:
        """Print what each level is judged by on the validation images."""
        when = f"after epoch {epoch}" if moment == "epoch" else moment
        title = results[0].metric.title if results else TOP1.title
        self._print_progress(
            f"validation {title} ({when}): {_join([result.score for result in results], '.2f')}"
        )
        self._epoch_start = time.perf_counter()

    def skipped(self, split: str, images: dict[str, str]) -> None:
        """Print how many images were left out, and the first of their names."""
        if images:
            self._print_progress(printable(f"{split} images: skipped {summarize_images(images)}"))

    def warned(self, text: str) -> None:
        """Print a warning, and keep it for `repeat_warnings`."""
        text = printable(text, LONGEST_MESSAGE)
        self.warnings.append(text)
        self._print(f"warning: {text}")

    def repeat_warnings(self) -> None:
        """Print the warnings again after the result, because they may have scrolled away."""
        for text in dict.fromkeys(self.warnings):  # a plan and its run may warn of the same
            self._print_progress(f"warning: {text}")

    def _is_line_due(self) -> bool:
        """Return whether to print a line within an epoch: if verbose, where there is no bar."""
        seconds = time.perf_counter() - self._last_line
        return self._verbose and not self._has_bars and seconds >= SECONDS_BETWEEN_LINES

    def _print_progress(self, text: str) -> None:
        self._last_line = time.perf_counter()
        if not self._quiet:
            self._print(text)

    def _print(self, text: str) -> None:
        text = name_flags(Recipe, text)
        if self._has_bars:
            self.console.print(Text.from_ansi(text))
        else:
            print_stderr(text)


class PythonWarnings(Observer):
    """Issues the warnings of a run as Python's warnings, at the line that called nestify; shows no progress.

    Args:
        caller: the line.
    """

    def __init__(self, caller: Caller) -> None:
        self.caller = caller

    def __enter__(self) -> "PythonWarnings":
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing; a `Display` ends its bars here."""

    def skipped(self, split: str, images: dict[str, str]) -> None:
        """Warn that images were left out."""
        if images:
            self.caller.warn(f"{split} images: skipped {summarize_images(images)}")

    def warned(self, text: str) -> None:
        """Issue the warning."""
        self.caller.warn(text)

    def repeat_warnings(self) -> None:
        """Do nothing, because Python's warnings do not scroll away behind a progress bar."""


def usual_observer(*, quiet: bool = False) -> Display | PythonWarnings:
    """Return the observer of a run for which the caller gave none.

    At a terminal and in a notebook it shows what the command line shows. Elsewhere it shows no progress, and
    issues warnings as Python's warnings at the line that called nestify.

    Args:
        quiet: whether to show warnings only.
    """
    console = Console(stderr=True)
    if console.is_terminal or console.is_jupyter:
        return Display(quiet=quiet)
    return PythonWarnings(find_caller())


class _BarAndDetail(Progress):
    """A progress bar with its details on the line below, where there is room for them."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            yield Text(task.fields["detail"])


def _join(values: Sequence[float], form: str) -> str:
    """Join one number per level; a level that has not been trained yet is a dash."""
    return " / ".join("-" if isnan(value) else format(value, form) for value in values)
