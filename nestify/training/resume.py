"""Resume interrupted runs: when a run's checkpoint is saved, found, refused and removed."""

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from nestify.data.loaders import Loader
from nestify.errors import DivergedError, OutputError, ProcessError, RecipeError, foreign_code
from nestify.signals import DeferredSignals, defer_signals
from nestify.training.checkpoint import (
    Checkpoint,
    CheckpointInfo,
    EarlyResults,
    damaged_error,
    read_checkpoint,
    share_checkpoint,
    write_checkpoint,
)
from nestify.training.distributed import SINGLE, World
from nestify.training.identity import Identity, find_difference
from nestify.training.loop import CheckpointHook
from nestify.training.observer import Observer, Phase
from nestify.training.stepper import Stepper

_PHASE_NAMES = {"finetune": "the fine-tuning", "train": "the training"}


class Checkpoints(CheckpointHook):
    """The checkpoint file of one run.

    The checkpoint is saved at the end of every epoch, every few minutes, and when a signal ends the run.

    Args:
        path: path of the checkpoint.
        run: identity of the run.
        minutes: time between two checkpoints; 0 saves none, and signals then end the run at once.
        skipped: reason why an image could not be read, by split and file name; saved in the checkpoint, and
            updated from it when the run resumes.
        world: the processes of the run. Rank 0 saves the checkpoint; all processes save and stop after the
            same step, and all end if rank 0 fails.

    Attributes:
        observer: notified where the run resumes; its log offsets are saved in the checkpoint.
        early_results: results of the run so far, which are saved in the checkpoint.
        log_offsets: log offsets from the checkpoint of the run that resumes; empty for a new run.
        tracker_runs: runs of experiment trackers from that checkpoint, by the tracker's name.
    """

    def __init__(
        self,
        path: Path,
        run: Identity,
        minutes: float,
        skipped: Mapping[str, dict[str, str]],
        world: World = SINGLE,
    ) -> None:
        self.path = path
        self.observer = Observer()
        self.early_results = EarlyResults()
        self.log_offsets: Mapping[str, float] = {}
        self.tracker_runs: Mapping[str, str] = {}
        self._found: Checkpoint | None = None
        self._dense: Mapping[str, Tensor] = {}
        self._run = run
        self._world = world
        self._minutes = minutes
        self._skipped = skipped
        self._phase: Phase = "train"
        self._earlier = self._later = 0
        self._saved: tuple[Phase, int, int] | None = None
        self._time = time.monotonic()
        self._signals = DeferredSignals()

    # -- before and after the training ---------------------------------------------------------------

    def find(self, wanted: bool | None) -> None:
        """Read the checkpoint of this run, if there is one.

        Rank 0 reads it for all processes, which need not see its folder.

        Args:
            wanted: True: a checkpoint must exist. False: an existing checkpoint is removed. None: the run
                resumes if a checkpoint exists.

        Raises:
            RecipeError: if the checkpoint must exist and does not, or belongs to a different run.
            CheckpointError: if the checkpoint is damaged.
            ProcessError: if the processes have different models, images or packages.
        """
        self._check_same_run()
        found: list[Checkpoint | None] = [None]

        def look() -> None:
            found[0] = self._read(wanted)

        self._world.on_main(look)
        checkpoint = share_checkpoint(found[0], self._world)
        if checkpoint is None:
            return
        info = checkpoint.info
        self._found, self._dense = checkpoint, checkpoint.dense
        self.early_results, self.log_offsets = info.findings, info.marks
        self.tracker_runs = info.trackers
        self._saved = info.phase, info.step, info.total
        for split, reasons in info.findings.skipped.items():
            self._skipped[split].update(reasons)

    def _check_same_run(self) -> None:
        """Refuse processes that would train different runs, because their nodes differ.

        Raises:
            ProcessError: naming the first difference.
        """
        first, *others = self._world.all_gather(self._run)
        for rank, other in enumerate(others, start=1):
            sentence = f"{{key}} is {{new}} on rank {rank} and {{old}} on rank 0"
            if difference := find_difference(first, other, sentence):
                raise ProcessError(
                    f"{difference}; give all nodes the same files and the same packages, or a shared folder"
                )

    def _read(self, wanted: bool | None) -> Checkpoint | None:
        """Do the work of `find` on rank 0, and return the checkpoint."""
        if wanted is False:
            self.remove()
            return None
        if not self.path.exists():
            if wanted:
                raise RecipeError(
                    f"--resume: there is no checkpoint {self.path}; leave out --resume to start a new run"
                )
            return None
        checkpoint = read_checkpoint(self.path)
        if difference := find_difference(checkpoint.info.run, self._run):
            raise RecipeError(
                f"{self.path} belongs to a different run: {difference}; change it back, or use --restart to "
                "start from scratch"
            )
        return checkpoint

    @property
    def is_in_train_phase(self) -> bool:
        """Whether the run resumes in the training of its levels, so that everything before it is done."""
        return self._found is not None and self._found.info.phase == "train"

    @property
    def frozen(self) -> int | None:
        """Number of frozen levels in the training stage where the run resumes; None if it does not resume."""
        if not self.is_in_train_phase:
            return None
        assert self._found is not None
        return int(self._found.training.get("frozen", 0))

    def add_results(self, **results: object) -> None:
        """Add results of the run so far, by the attributes of `EarlyResults`, to later checkpoints."""
        self.early_results = self.early_results.model_copy(update=results)

    def save_dense(self, network: nn.Module) -> None:
        """Include the fine-tuned dense model in later checkpoints.

        A run that resumes makes the nested model and the teacher from it.
        """
        if self._minutes:
            self._dense = {name: tensor.cpu().clone() for name, tensor in network.state_dict().items()}

    def load_dense(self, network: nn.Module) -> None:
        """Load the weights of the fine-tuned dense model from the checkpoint into a network.

        Raises:
            CheckpointError: if the weights do not fit the network.
        """
        with foreign_code(partial(damaged_error, self.path)):
            network.load_state_dict(dict(self._dense))

    def remove(self) -> None:
        """Remove the checkpoint, if there is one.

        Raises:
            OutputError: if the file cannot be removed.
        """
        self._saved = None
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be removed ({error.strerror or error}); remove it manually"
            ) from error

    @contextmanager
    def noting_resume_point(self) -> Iterator[None]:
        """Add the step from which the run can resume to an exception that ends the run."""
        try:
            yield
        except DivergedError as error:
            if self._saved is None:
                raise
            raise DivergedError(
                f"{error}, with --restart, because resuming {self.path} from {self._saved_position()} would "
                "diverge again"
            ) from error
        except BaseException as error:
            if self._saved is not None:
                error.add_note(f"the same command resumes from {self._saved_position()}")
            raise

    # -- during a training ---------------------------------------------------------------------------

    @contextmanager
    def running(self, phase: Phase, earlier: int = 0, later: int = 0) -> Iterator["Checkpoints"]:
        """Save checkpoints of a training; signals are deferred until a checkpoint can be saved.

        Args:
            phase: the training that runs in the block.
            earlier: number of steps of earlier stages of this training.
            later: number of steps of later stages.
        """
        self._phase, self._earlier, self._later = phase, earlier, later
        self._time = time.monotonic()
        if not self._minutes:
            yield self
            return
        with defer_signals() as self._signals:
            yield self
            if any(self._world.all_gather(self.stop_requested)):
                self._stop()

    def interruptible(self, batches: Loader) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an evaluation between two steps, which a signal may end.

        The training needs no checkpoint there, because one was saved before the evaluation. Several processes
        agree to stop in their next step instead, since the others would wait for one that has ended.
        """
        with closing(batches.epoch(0)) as epoch_batches:
            for batch in epoch_batches:
                if self._world.size == 1:
                    self._signals.deliver()
                yield batch

    @property
    def stop_requested(self) -> bool:
        """Whether a signal asked this process to stop."""
        return self._signals.pending is not None

    @property
    def save_due(self) -> bool:
        """Whether a checkpoint is due by rank 0's clock."""
        late = self._minutes > 0 and time.monotonic() - self._time >= 60 * self._minutes
        return late and self._world.is_main

    def resume(self, training: Stepper) -> None:
        """Restore the state of the training, if the checkpoint is from this phase.

        Raises:
            CheckpointError: if the state does not fit the training.
        """
        found = self._found
        if found is None or found.info.phase != self._phase:
            return
        with foreign_code(partial(damaged_error, self.path)):
            training.restore(found.training)
        self._found = None
        self.observer.stage(f"resuming at {self._saved_position()}")

    def between_steps(self, training: Stepper, *, epoch_ended: bool = False) -> None:
        """Save a checkpoint if one is due, and deliver a deferred signal.

        Raises:
            DivergedError: if a checkpoint is due and a loss or a weight is not finite.
        """
        if not self._minutes:
            return
        if epoch_ended:
            training.read_requests()
        alone = self._world.size == 1  # several processes agree in the step after the request
        due = self.save_due if alone else training.should_save
        stopping = self.stop_requested if alone else training.should_stop
        if epoch_ended or due or stopping:
            self._save(training, self._world)
            training.forget_requests()
        if stopping:
            self._stop()

    def _stop(self) -> None:
        """Deliver the deferred signal, or SIGTERM if it was another process that received one."""
        self._signals.pending = self._signals.pending or signal.SIGTERM
        self._signals.deliver()

    def on_failure(self, training: Stepper) -> None:
        """Save a checkpoint, unless the exception came in the middle of a step, and deliver a signal."""
        if self._minutes and not training.interrupted:
            with suppress(DivergedError):
                if self._world.is_main:
                    self._save(training, SINGLE)  # the other processes may have ended
            self._signals.deliver()

    def _save(self, training: Stepper, world: World) -> None:
        """Save a checkpoint of this step, if there is none yet; the run continues if it cannot be written.

        Args:
            training: the training.
            world: the processes that call this together.
        """
        step = self._earlier + training.position.step
        position = self._phase, step, self._earlier + training.total + self._later
        if position == self._saved or not training.position.step:
            return
        for split in self._skipped:
            for reasons in world.all_gather(self._skipped[split]):
                self._skipped[split].update(reasons)
        state = training.state(world)
        info = CheckpointInfo(
            run=self._run,
            phase=self._phase,
            step=step,
            total=position[2],
            findings=self.early_results.model_copy(
                update={"skipped": {split: dict(reasons) for split, reasons in self._skipped.items()}}
            ),
            marks=self.observer.log_offsets(),
            trackers=self.observer.tracker_runs(),
        )

        def write() -> bool:
            training.check_finite()
            try:
                if self._world.is_main:
                    write_checkpoint(self.path, Checkpoint(info, state, self._dense))
            except OutputError as error:
                self.observer.warned(f"the checkpoint was not saved, and will be tried again: {error}")
                return False
            return True

        if world.everywhere(write)[0]:
            self._saved = position
        self._time = time.monotonic()

    def _saved_position(self) -> str:
        """Describe the position of the saved checkpoint, for messages."""
        assert self._saved is not None
        phase, step, total = self._saved
        return f"step {step} of {total} of {_PHASE_NAMES[phase]}"
