"""Progress of a run on standard error, and plans as text and JSON."""

import sys
import time
from collections.abc import Iterable, Sequence
from math import isnan
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from nestify.addresses import hide_passwords
from nestify.cli.output import Verbosity, print_stderr, render, verbosity
from nestify.evaluation.accuracy import Accuracy
from nestify.report.table import mebibytes, plan_table, quantity, summarize_images
from nestify.schedule.costs import Plan
from nestify.training.observer import Moment, Observer, Phase
from nestify.training.progress import StepLog

SCHEMA_VERSION = 1
SECONDS_BETWEEN_LINES = 10.0
"""Seconds between lines within an epoch, with --verbose and without a bar."""


class Display(Observer):
    """Progress of a run on standard error.

    At a terminal it is a bar, elsewhere a line per epoch. With --quiet only warnings are printed.
    """

    def __init__(self) -> None:
        self._quiet = verbosity() is Verbosity.quiet
        self._verbose = verbosity() is Verbosity.verbose
        self.console = Console(stderr=True, highlight=False, markup=False)
        self.progress = _BarAndDetail(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=self._quiet or not self.console.is_terminal,
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
        self._print_progress(text)

    def planned(self, plan: Plan) -> None:
        """Print the plan."""
        self._print_progress(plan_text(plan, sys.stderr))

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """Move the bar; print a line at the end of an epoch, and in between where one is due."""
        seconds = time.perf_counter() - self._epoch_start
        speed = f"{log.images / seconds:.0f} images/s" if seconds else ""
        detail = f"loss {_join(log.losses, '.3f')}  top-1 {_join(log.top1, '.1f')}  {speed}"
        if phase not in self._bars:
            self._bars[phase] = self.progress.add_task(phase, total=log.total_steps, detail="")
        self.progress.update(self._bars[phase], completed=log.step, detail=detail)
        if log.step == log.total_steps:
            self.progress.remove_task(self._bars.pop(phase))
        if log.epoch_ended or self._is_line_due():
            self._print_progress(f"{phase} epoch {log.epoch} ({log.step}/{log.total_steps} steps): {detail}")
        if log.epoch_ended:
            self._epoch_start = time.perf_counter()

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Accuracy]) -> None:
        """Print the validation accuracy of each level."""
        when = f"after epoch {epoch}" if moment == "epoch" else moment
        self._print_progress(
            f"validation top-1 ({when}): {_join([result.top1 for result in results], '.2f')}"
        )
        self._epoch_start = time.perf_counter()

    def skipped(self, split: str, images: dict[str, str]) -> None:
        """Print how many images were left out, and the first of their names."""
        if images:
            self._print_progress(f"{split} images: skipped {summarize_images(images)}")

    def warned(self, text: str) -> None:
        """Print a warning, and keep it for `repeat_warnings`."""
        self.warnings.append(text)
        self._print(f"warning: {text}")

    def repeat_warnings(self) -> None:
        """Print the warnings again after the result, because they may have scrolled away."""
        for text in self.warnings:
            self._print_progress(f"warning: {text}")

    def _is_line_due(self) -> bool:
        """Return whether to print a line within an epoch: with --verbose, where there is no bar."""
        seconds = time.perf_counter() - self._last_line
        return self._verbose and not self.console.is_terminal and seconds >= SECONDS_BETWEEN_LINES

    def _print_progress(self, text: str) -> None:
        self._last_line = time.perf_counter()
        if not self._quiet:
            self._print(text)

    def _print(self, text: str) -> None:
        if self.console.is_terminal:
            self.console.print(Text.from_ansi(hide_passwords(text)))
        else:
            print_stderr(text)


class _BarAndDetail(Progress):
    """A progress bar with its details on the line below, where there is room for them."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            yield Text(task.fields["detail"])


def plan_text(plan: Plan, stream: TextIO | None) -> str:
    """Return a plan as text.

    Args:
        plan: plan of a run.
        stream: where the text will be printed; None for a file. If it is a terminal, the text fits its width.
    """
    spec = plan.spec
    size = "x".join(map(str, spec.input_size))
    notes = [
        f"images: {plan.train_images} to train on, {plan.val_images} to validate on",
        f"steps: {plan.finetune_steps} of fine-tuning, {plan.steps} of nested training",
    ]
    if plan.seconds is not None and plan.memory_bytes is not None:
        notes.append(
            f"estimate: {plan.seconds / 60:.1f} min of training steps on this machine, without loading and "
            f"validation; {mebibytes(plan.memory_bytes)} MiB of memory for a step"
        )
    if plan.dense_layers:
        notes.append(
            f"the pattern does not divide these weights, which stay dense: {', '.join(plan.dense_layers)}"
        )
    if plan.without_rule:
        operators = ", ".join(plan.without_rule)
        notes.append(f"no rule covers these operators, so every level keeps all their channels: {operators}")
    if plan.uncounted:
        notes.append(f"MACs do not include these unknown operators: {', '.join(plan.uncounted)}")
    notes += [f"warning: {warning}" for warning in plan.warnings]
    parts = []
    if plan.maskable:
        parts.append(f"{quantity(plan.maskable)} maskable weights in {len(spec.maskable)} layers")
    if plan.channel_groups:
        parts.append(f"{plan.channel_groups} groups of coupled channels")
    if plan.blocks:
        parts.append(f"{plan.blocks} blocks that can be skipped")
    what = ", ".join(parts)
    title = f"{spec.architecture}, {spec.num_classes} classes, input {size}, {what}"
    return render(title, [plan_table(plan)], notes, stream)


def plan_document(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "architecture": plan.spec.architecture,
        "num_classes": plan.spec.num_classes,
        "input_size": list(plan.spec.input_size),
        "maskable": plan.maskable,
        "channel_groups": plan.channel_groups,
        "blocks": plan.blocks,
        "without_rule": list(plan.without_rule),
        "dense_layers": list(plan.dense_layers),
        "train_images": plan.train_images,
        "val_images": plan.val_images,
        "finetune_steps": plan.finetune_steps,
        "steps": plan.steps,
        "seconds": plan.seconds,
        "memory_bytes": plan.memory_bytes,
        "uncounted": dict(plan.uncounted),
        "warnings": list(plan.warnings),
        "levels": [
            {
                "level": k,
                "name": planned.level.name,
                "width": planned.level.width,
                "depth": planned.level.depth,
                "classes": planned.classes,
                "class_set": planned.class_set,
                "sparsity": planned.cost.sparsity,
                "pattern": str(planned.level.pattern),
                "parameters": planned.cost.parameters,
                "nonzero_parameters": planned.cost.nonzero_parameters,
                "dense_macs": planned.cost.dense_macs,
                "effective_macs": planned.cost.effective_macs,
                "prefix_bytes": planned.prefix_bytes,
            }
            for k, planned in enumerate(plan.levels, start=1)
        ],
    }


def _join(values: Sequence[float], form: str) -> str:
    """Join one number per level; a level that has not been trained yet is a dash."""
    return " / ".join("-" if isnan(value) else format(value, form) for value in values)
