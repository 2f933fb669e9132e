"""TensorBoard events of a run."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import Any

from nestify.errors import OutputError, RecipeError, foreign_code
from nestify.evaluation.measure import Score
from nestify.training.observer import Moment, Observer, Phase
from nestify.training.progress import StepLog

_STEP = "tensorboard_step"


class TensorBoardLog(Observer):
    """TensorBoard events in the folder `NAME.tensorboard`.

    Args:
        folder: folder of the events; events of an older run in it are removed.
        log_offsets: offsets from the checkpoint of the run that resumes, whose events are continued. Empty
            for a new run.
        finetune_steps: steps of the fine-tuning; the steps of the training are counted from there.
        warn: receives a warning when events cannot be written; the log then ends there.

    Raises:
        RecipeError: if TensorBoard is not installed.
        OutputError: if the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        log_offsets: Mapping[str, float],
        finetune_steps: int,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._folder, self._warn, self._ended = folder, warn, False
        self._first_step: dict[Phase, int] = {"finetune": 0, "train": finetune_steps}
        self._step = int(log_offsets.get(_STEP, 0))
        try:
            if not self._step:
                for old in folder.glob("events.out.tfevents.*"):
                    old.unlink()
            self._writer = summary_writer()(str(folder), purge_step=self._step + 1 if self._step else None)
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be written ({error.strerror or error}); choose another --output or leave "
                "out --log tensorboard"
            ) from error

    def stepped(self, phase: Phase, log: StepLog) -> None:
        """Add the losses, training accuracies and sparsities of the levels, and the learning rate."""
        self._step = self._first_step[phase] + log.step
        with self._writing():
            levels = range(1, len(log.losses) + 1)
            rows = {"loss": log.losses, log.metric.key: log.scores, "sparsity": log.sparsity}
            self._add(phase, levels, rows)
            self._writer.add_scalar(f"{phase}/lr", log.lr, self._step)

    def evaluated(self, moment: Moment, epoch: int, results: Sequence[Score]) -> None:
        """Add the accuracies and losses of the levels on the validation images."""
        if moment in ("epoch", "after"):
            names = results[0].metric.values if results else ()
            rows = {name: [getattr(result, name) for result in results] for name in names}
            with self._writing():
                self._add("validation", [result.level for result in results], rows)
                self._writer.flush()

    def log_offsets(self) -> dict[str, float]:
        """Return the last step that was logged."""
        with self._writing():
            self._writer.flush()
        return {_STEP: self._step}

    def close(self) -> None:
        """Write the remaining events, and close the file."""
        with self._writing():
            self._writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """End the log with a warning if TensorBoard cannot write; its writer cannot be used again."""

        def describe(reason: str) -> OutputError:
            return OutputError(
                f"{self._folder} cannot be written ({reason}); the run continues, and its events end here"
            )

        try:
            with foreign_code(describe):
                yield
        except OutputError as error:
            if not self._ended:
                self._warn(str(error))
            self._ended = True

    def _add(self, group: str, levels: Sequence[int], rows: Mapping[str, Sequence[float]]) -> None:
        for name, row in rows.items():
            for k, value in zip(levels, row, strict=True):
                if not isnan(value):  # a level that was not sampled
                    self._writer.add_scalar(f"{group}/{name}/level{k}", value, self._step)


def summary_writer() -> Any:
    """Return the class that writes events.

    Raises:
        RecipeError: if TensorBoard is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations within TensorBoard
            from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RecipeError(
            "train.log: tensorboard is not installed; pip install 'nestify[tensorboard]', or use --log csv"
        ) from error
    return SummaryWriter
