"""A run that ended before its time goes on: when its checkpoint is written, found, refused and removed."""

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from torch import Tensor, nn

from nestify.data.loaders import Loader
from nestify.errors import DivergedError, OutputError, RecipeError
from nestify.signals import PutOff, put_off
from nestify.training.checkpoint import (
    Checkpoint,
    Facts,
    Findings,
    damaged,
    read_checkpoint,
    write_checkpoint,
)
from nestify.training.distributed import ALONE, World
from nestify.training.identity import Identity, difference
from nestify.training.loop import Keeper
from nestify.training.observer import Observer, Phase
from nestify.training.stepper import Stepper

_CALLED = {"finetune": "the fine-tuning", "train": "the training"}


class Checkpoints(Keeper):
    """Keeps one run in a file, at the end of every epoch, every few minutes, and when a signal ends the run.

    Args:
        path: of the file.
        run: which run it is.
        minutes: between two checkpoints; 0 keeps nothing, and signals then end the run at once.
        skipped: why images could not be read, by split; kept, and put back.
        world: the processes of the run. The first one writes; they stop together, after the same step.

    Attributes:
        observer: told where the run goes on; its marks are kept.
        findings: of the run so far, which are kept as well.
        marks: how far the logs of the run that goes on were written; empty where it begins.
    """

    def __init__(
        self,
        path: Path,
        run: Identity,
        minutes: float,
        skipped: Mapping[str, dict[str, str]],
        world: World = ALONE,
    ) -> None:
        self.path = path
        self.observer = Observer()
        self.findings = Findings()
        self.marks: Mapping[str, float] = {}
        self._found: Checkpoint | None = None
        self._dense: Mapping[str, Tensor] = {}
        self._run = run
        self._world = world
        self._minutes = minutes
        self._skipped = skipped
        self._phase: Phase = "train"
        self._kept: tuple[Phase, int, int] | None = None
        self._time = time.monotonic()
        self._stops = PutOff()

    # -- before and after the training ---------------------------------------------------------------

    def find(self, wanted: bool | None) -> None:
        """Look for a checkpoint of this run.

        Args:
            wanted: True: there must be one. False: it is removed. None: the run goes on if there is one.

        Raises:
            RecipeError: if there is none where one is wanted, or it is of another run.
            CheckpointError: if it is damaged.
        """
        if wanted is False:
            self.remove()
            return
        if not self.path.exists():
            if wanted:
                raise RecipeError(
                    f"--resume: there is no checkpoint {self.path} to go on from; leave it out to begin"
                )
            return
        checkpoint = read_checkpoint(self.path)
        facts = checkpoint.facts
        if differs := difference(facts.run, self._run):
            raise RecipeError(
                f"{self.path} is of another run: {differs}; put it back, or pass --restart to begin anew"
            )
        self._found, self._dense = checkpoint, checkpoint.dense
        self.findings, self.marks = facts.findings, facts.marks
        self._kept = facts.phase, facts.step, facts.total
        for split, reasons in facts.findings.skipped.items():
            self._skipped[split].update(reasons)

    @property
    def nests(self) -> bool:
        """Whether the run goes on where its levels are trained, so that what comes before is done."""
        return self._found is not None and self._found.facts.phase == "train"

    def keep_dense(self, network: nn.Module) -> None:
        """Keep the fine-tuned dense model, which teaches and of which the nested one is made again."""
        if self._minutes:
            self._dense = {name: tensor.cpu().clone() for name, tensor in network.state_dict().items()}

    def load_dense(self, network: nn.Module) -> None:
        """Give a network the weights that the dense one had after its fine-tuning.

        Raises:
            CheckpointError: if they do not fit.
        """
        try:
            network.load_state_dict(dict(self._dense))
        except (RuntimeError, AttributeError, TypeError) as error:
            raise damaged(self.path, error) from error

    def remove(self) -> None:
        """Remove the checkpoint, if there is one.

        Raises:
            OutputError: if it cannot be removed.
        """
        self._kept = None
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be removed ({error.strerror or error}); remove it by hand"
            ) from error

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Note on what ends the run from where it can go on."""
        try:
            yield
        except DivergedError as error:
            if self._kept is None:
                raise
            raise DivergedError(
                f"{error}, with --restart, because it would go the same way again from "
                f"{self._place()}, which {self.path} keeps"
            ) from error
        except BaseException as error:
            if self._kept is not None:
                error.add_note(f"the same command goes on from {self._place()}")
            raise

    # -- during a training ---------------------------------------------------------------------------

    @contextmanager
    def watching(self, phase: Phase) -> Iterator["Checkpoints"]:
        """Keep a training; signals wait until it can be kept."""
        self._phase = phase
        self._time = time.monotonic()
        if not self._minutes:
            yield self
            return
        with put_off() as self._stops:
            yield self

    def interruptible(self, batches: Loader) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of an evaluation between two steps, which a signal ends; it was kept before."""
        with closing(batches.epoch(0)) as passing:
            for batch in passing:
                self._stops.act()
                yield batch

    @property
    def asked_to_stop(self) -> bool:
        return self._stops.came is not None

    def resume(self, training: Stepper) -> None:
        """See `Keeper`.

        Raises:
            CheckpointError: if what was found does not fit this training.
        """
        found = self._found
        if found is None or found.facts.phase != self._phase:
            return
        try:
            training.restore(found.training)
        except Exception as error:  # whatever torch, timm and Python make of values that do not fit
            raise damaged(self.path, error) from error
        self._found = None
        self.observer.stage(f"resuming at {self._place()}")

    def between_steps(self, training: Stepper, *, epoch_ended: bool = False) -> None:
        """See `Keeper`."""
        if not self._minutes:
            return
        due = time.monotonic() - self._time >= 60 * self._minutes
        stopping = training.stopping if self._world.size > 1 else self.asked_to_stop
        if epoch_ended or due or stopping:
            self._keep(training)
        if stopping:
            self._stops.came = self._stops.came or signal.SIGTERM
            self._stops.act()

    def failed(self, training: Stepper) -> None:
        """See `Keeper`."""
        if self._minutes and not training.torn:
            with suppress(DivergedError):
                self._keep(training)
            self._stops.act()

    def _keep(self, training: Stepper) -> None:
        """Write a checkpoint, unless the last one is of this step. A run is not lost because that fails."""
        place = self._phase, training.place.step, training.total
        if place == self._kept or not training.place.step or not self._world.leads:
            return
        training.check()
        skipped = {split: dict(reasons) for split, reasons in self._skipped.items()}
        facts = Facts(
            run=self._run,
            phase=self._phase,
            step=training.place.step,
            total=training.total,
            findings=self.findings.model_copy(update={"skipped": skipped}),
            marks=self.observer.marks(),
        )
        try:
            write_checkpoint(self.path, Checkpoint(facts, training.state(), self._dense))
            self._kept = place
        except OutputError as error:
            self.observer.warned(f"no checkpoint: {error}")
        self._time = time.monotonic()

    def _place(self) -> str:
        assert self._kept is not None
        phase, step, total = self._kept
        return f"step {step} of {total} of {_CALLED[phase]}"
