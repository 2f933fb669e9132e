"""How a run shows itself on standard error, and a plan as text."""

import sys
import time
from collections.abc import Iterable, Sequence
from math import isnan
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from nestify.cli.output import Verbosity, render, say, verbosity
from nestify.evaluation.accuracy import Accuracy
from nestify.report.table import mebibytes, plan_table, quantity, some_images
from nestify.schedule.costs import Plan
from nestify.training.observer import Moment, Observer, Phase
from nestify.training.progress import StepLog

SCHEMA_VERSION = 1
SECONDS_BETWEEN_LINES = 10.0


class Display(Observer):
    """Progress on standard error: a bar at a terminal, a line per epoch elsewhere, and none with --quiet."""

    def __init__(self) -> None:
        self._quiet = verbosity() is Verbosity.quiet
        self._often = verbosity() is Verbosity.verbose
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
        """One line."""
        self._epoch_start = time.perf_counter()
        self._say(text)

    def planned(self, plan: Plan) -> None:
        """The whole plan, above the work."""
        self._say(plan_text(plan, sys.stderr))

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """The bar moves; a finished epoch leaves a line."""
        seconds = time.perf_counter() - self._epoch_start
        speed = f"{log.images / seconds:.0f} images/s" if seconds else ""
        detail = f"loss {_joined(log.losses, '.3f')}  top-1 {_joined(log.top1, '.1f')}  {speed}"
        if phase not in self._bars:
            self._bars[phase] = self.progress.add_task(phase, total=log.total_steps, detail="")
        self.progress.update(self._bars[phase], completed=log.step, detail=detail)
        if log.step == log.total_steps:
            self.progress.remove_task(self._bars.pop(phase))
        if log.epoch_ended or self._is_time():
            self._say(f"{phase} epoch {log.epoch} ({log.step}/{log.total_steps} steps): {detail}")
        if log.epoch_ended:
            self._epoch_start = time.perf_counter()

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Accuracy]) -> None:
        """One line."""
        when = f"after epoch {epoch}" if moment == "epoch" else moment
        self._say(f"validation top-1 ({when}): {_joined([result.top1 for result in results], '.2f')}")
        self._epoch_start = time.perf_counter()

    def skipped(self, split: str, images: dict[str, str]) -> None:
        """The number of images that were left out, and the first names."""
        if images:
            self._say(f"{split} images: skipped {some_images(images)}")

    def warned(self, text: str) -> None:
        """One line now, and one at the end."""
        self.warnings.append(text)
        self._tell(f"warning: {text}")

    def repeat_warnings(self) -> None:
        """Say again, after the result, what might have scrolled away."""
        for text in self.warnings:
            self._say(f"warning: {text}")

    def _is_time(self) -> bool:
        """Whether a line is due between those of the epochs, where there is no bar."""
        seconds = time.perf_counter() - self._last_line
        return self._often and not self.console.is_terminal and seconds >= SECONDS_BETWEEN_LINES

    def _say(self, text: str) -> None:
        self._last_line = time.perf_counter()
        if not self._quiet:
            self._tell(text)

    def _tell(self, text: str) -> None:
        if self.console.is_terminal:
            self.console.print(Text.from_ansi(text))
        else:
            say(text)


class _BarAndDetail(Progress):
    """A bar, and what there is to say of it in the line below, where it has room."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            yield Text(task.fields["detail"])


def plan_text(plan: Plan, stream: TextIO | None) -> str:
    """A plan for people, fitted to where it will be written."""
    spec = plan.spec
    size = "x".join(map(str, spec.input_size))
    notes = [
        f"images: {plan.train_images} to train on, {plan.val_images} to validate on",
        f"steps: {plan.finetune_steps} of fine-tuning, {plan.steps} of nested training",
    ]
    if plan.seconds is not None and plan.memory_bytes is not None:
        notes.append(
            f"estimate: {plan.seconds / 60:.1f} min of training steps on this machine, loading and "
            f"validation aside; {mebibytes(plan.memory_bytes)} MiB of memory for a step"
        )
    if plan.dense_layers:
        notes.append(f"the pattern does not divide these, which stay dense: {', '.join(plan.dense_layers)}")
    if plan.without_rule:
        notes.append(f"every level has the channels of these operators whole: {', '.join(plan.without_rule)}")
    if plan.uncounted:
        notes.append(f"MACs leave out operators that are not known: {', '.join(plan.uncounted)}")
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
    """A plan as plain JSON values."""
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


def _joined(values: Sequence[float], form: str) -> str:
    """One number per level; a dash for a level that was not trained yet."""
    return " / ".join("-" if isnan(value) else format(value, form) for value in values)
