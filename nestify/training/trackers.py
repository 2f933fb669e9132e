"""Experiment trackers: Weights & Biases and MLflow receive the metrics, options and files of a run."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any

from nestify.addresses import hide_passwords_in
from nestify.errors import OutputError, RecipeError, foreign_code
from nestify.evaluation.measure import Score
from nestify.training.observer import Moment, Observer, Phase
from nestify.training.progress import StepLog
from nestify.training.tracker_runs import MlflowRun, TrackedRun, Tracker, WandbRun, wandb_can_start


class TrackerLog(Observer):
    """Sends the metrics of a run to a tracker; the log ends with a warning when the tracker fails.

    Args:
        name: `wandb` or `mlflow`.
        run: the run.
        finetune_steps: steps of the fine-tuning; the steps of the training are counted from there.
        warn: receives the warning.

    Raises:
        RecipeError: if the package is not installed, or W&B has no key.
        OutputError: if the tracker cannot start a run.
    """

    def __init__(self, name: str, run: TrackedRun, finetune_steps: int, warn: Callable[[str], None]) -> None:
        self._name, self._warn, self._ended = name, warn, False
        self._first_step: dict[Phase, int] = {"finetune": 0, "train": finetune_steps}
        self._step = 0

        def describe(reason: str) -> OutputError:
            return OutputError(
                f"train.log: {name} cannot start a run ({reason}); {_KINDS[name].remedy}, or leave out "
                f"--log {name}"
            )

        check_tracker(name)
        with _silent(), foreign_code(describe):
            self._tracker: Tracker = _KINDS[name].start(run)

    def __enter__(self) -> "TrackerLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(lambda: self._tracker.finish(kind is None))

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """Send the losses, training accuracies and sparsities of the levels, and the learning rate."""
        self._step = self._first_step[phase] + log.step
        rows = {"loss": log.losses, log.metric.key: log.scores, "sparsity": log.sparsity}
        self._send(_values(phase, range(1, len(log.losses) + 1), rows) | {f"{phase}/lr": log.lr})

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Score]) -> None:
        """Send what was measured on the validation images: of the levels, or of the dense model."""
        names = results[0].metric.values if results else ()
        rows = {name: [getattr(result, name) for result in results] for name in names}
        group = moment if moment in ("original", "before") else "validation"
        self._send(_values(group, [result.level for result in results], rows))

    def written(self, files: Sequence[Path]) -> None:
        """Send the nested file and its report."""
        self._call(lambda: self._tracker.add_files(files))

    def tracker_runs(self) -> dict[str, str]:
        """Return the tracker's name of the run."""
        return {self._name: self._tracker.run_id}

    def _send(self, values: Mapping[str, float]) -> None:
        finite = {name: value for name, value in values.items() if isfinite(value)}
        self._call(lambda: self._tracker.add(finite, self._step))

    def _call(self, call: Callable[[], None]) -> None:
        """Call the tracker; a failure is one warning, after which nothing more is sent."""

        def describe(reason: str) -> OutputError:
            return OutputError(
                f"--log {self._name}: {reason}; the run continues, and sends nothing more to it"
            )

        if self._ended:
            return
        try:
            with _silent(), foreign_code(describe):
                call()
        except OutputError as error:
            self._ended = True
            self._warn(str(error))


def _values(group: str, levels: Sequence[int], rows: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return values by name, as in `train/loss/level1`; level 0 is the dense model."""
    return {
        f"{group}/{name}/level{k}" if k else f"{group}/{name}": value
        for name, row in rows.items()
        for k, value in zip(levels, row, strict=True)
    }


@dataclass(frozen=True)
class _Kind:
    """A kind of tracker.

    Attributes:
        start: starts a run.
        remedy: what to do where it cannot start a run.
    """

    start: Callable[[TrackedRun], Tracker]
    remedy: str


_KINDS: Mapping[str, _Kind] = {
    "wandb": _Kind(WandbRun, "check WANDB_API_KEY and the network, or set WANDB_MODE=offline"),
    "mlflow": _Kind(MlflowRun, "set MLFLOW_TRACKING_URI to a server (http://...) or a folder (file:...)"),
}

TRACKERS = tuple(_KINDS)
"""Names of the trackers, as `--log` takes them."""


def check_tracker(name: str) -> None:
    """Check that a tracker's package is installed, and that W&B would not ask for a key.

    Raises:
        RecipeError: if not.
    """

    def describe(reason: str) -> RecipeError:
        return RecipeError(
            f"train.log: {name} cannot be used ({reason}); pip install --upgrade 'nestify[{name}]', or leave "
            f"out --log {name}"
        )

    try:
        with _silent(), foreign_code(describe):
            import_module(name)
    except RecipeError as error:
        if isinstance(error.__cause__, ModuleNotFoundError) and error.__cause__.name == name:
            raise RecipeError(
                f"train.log: {name} is not installed; pip install 'nestify[{name}]', or leave out --log "
                f"{name}"
            ) from error
        raise
    if name != "wandb":
        return
    with _silent(), foreign_code(describe):
        can_start = wandb_can_start()
    if not can_start:
        raise RecipeError(
            "train.log: wandb has no key, and a run never asks for one; set WANDB_API_KEY, or "
            "WANDB_MODE=offline to write files for `wandb sync`"
        )


@contextmanager
def _silent() -> Iterator[None]:
    """Keep warnings and notices of trackers off the terminal; failures are exceptions."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic", "wandb")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def tracked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options by dotted key without the passwords of addresses."""
    return {key: hide_passwords_in(value) for key, value in options.items()}
