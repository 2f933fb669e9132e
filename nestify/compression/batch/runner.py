"""Running jobs, several at a time, each in a process that ends with the batch."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from nestify.compression.batch.jobs import LOG, RECIPE, Job
from nestify.compression.batch.results import (
    GATE,
    JobResult,
    add_measurements,
    earlier_result,
    goes_on,
    is_over,
    log_tail,
    pending,
    save,
    versions,
)
from nestify.errors import OutputError
from nestify.files import atomic_file, checkpoint_path
from nestify.launcher import without_launcher
from nestify.machine import cores
from nestify.signals import defer_signals

PARENT_PIPE = "NESTIFY_PARENT_PIPE"
"""Environment variable of a job whose standard input is a pipe from the batch."""

PATIENCE = 120.0
"""Seconds that a job has for its checkpoint after the batch has ended."""


def watch_parent(patience: float = PATIENCE) -> None:
    """End this process as by SIGTERM when its standard input ends; if that takes long, kill its group."""
    threading.Thread(target=_follow, args=(sys.stdin.fileno(), patience), daemon=True).start()


def _follow(handle: int, patience: float) -> None:
    with suppress(OSError):
        while os.read(handle, 1024):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(patience)
    os.killpg(os.getpgrp(), signal.SIGKILL)


COMMAND = (sys.executable, "-m", "nestify", "compress")
"""Command of a job, followed by its recipe; it resumes if there is a checkpoint in the folder."""

PAUSE = 0.05
"""Seconds between two checks of the processes."""

PROGRAM = "nestify: "
"""Prefix of error messages on the command line."""


class BatchObserver:
    """Base of observers of a batch; all methods do nothing."""

    def began(self, job: Job, goes_on: bool) -> None:
        """A job's process was started, or started again from a checkpoint."""

    def ended(self, job: Job, result: JobResult) -> None:
        """A job has ended, or need not run."""

    def waiting(self, job: Job) -> None:
        """Another process uses the job's folder; called once. The job starts when it has ended."""

    def stopping(self, number: int) -> None:
        """A signal came; it was passed on to the jobs."""

    def ticked(self, running: Sequence[Job]) -> None:
        """Called many times a second, with the running jobs."""


@dataclass
class _Running:
    """A job's process.

    Attributes:
        log: its log, which is open and locked.
        older: identity of the file at its output when it started."""

    job: Job
    process: "subprocess.Popen[bytes]"
    begun: JobResult
    log: BinaryIO
    older: object
    start: float = field(default_factory=time.monotonic)

    def send(self, number: int) -> None:
        """Send a signal to the job's own process, which ends its workers."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def end_group(self) -> None:
        """Kill the job's remaining processes."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Runner:
    """Runs the jobs of a batch.

    Args:
        jobs: the jobs, in the order in which they start.
        observer: notified of progress.
        changed: called whenever one of `results` changes.
        max_parallel: number of processes at once.
        rerun: whether to run finished jobs too, from scratch.
        fail_fast: whether a failure prevents further jobs from starting.
        command: command of a job.

    Attributes:
        results: results by name, in the order of the jobs.
        stopped: the signal that ended the batch; None if there was none.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        observer: BatchObserver,
        changed: Callable[[], None],
        *,
        max_parallel: int = 1,
        rerun: bool = False,
        fail_fast: bool = False,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.results = {job.name: pending(job) for job in jobs}
        self.stopped: int | None = None
        self._waiting = list(jobs)
        self._running: list[_Running] = []
        self._option_value: set[str] = set()
        self._observer = observer
        self._changed = changed
        self._max_parallel = max_parallel
        self._rerun = rerun
        self._fail_fast = fail_fast
        self._command = command

    def run(self) -> None:
        """Run until all jobs have ended, or a signal stopped them; a second signal kills them.

        Raises:
            OutputError: if a job's folder cannot be written.
        """
        try:
            with defer_signals() as stops:
                while self._running or self._waiting:
                    if stops.pending is not None and self.stopped is None:
                        self._stop(stops.pending)
                    self._begin_some()
                    self._observer.ticked([each.job for each in self._running])
                    if self._running or self._waiting:
                        time.sleep(PAUSE)
                    self._collect_ended()
                stops.pending = None  # the signal was delivered
        except BaseException as error:
            if self.stopped is not None:
                error.add_note("the jobs were ended; the same command resumes from their last checkpoints")
            raise
        finally:
            self._end_all()

    def _stop(self, number: int) -> None:
        self.stopped = number
        self._waiting.clear()
        for each in self._running:
            each.send(number)
        self._observer.stopping(number)

    def _begin_some(self) -> None:
        for job in list(self._waiting):
            if len(self._running) >= self._max_parallel or not self._waiting:
                return
            if self._begin(job) and self._waiting:  # a failure may have cleared them
                self._waiting.remove(job)

    def _begin(self, job: Job) -> bool:
        """Start a job's process, unless it is done; False if another process uses the folder."""
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as opened:
                log = opened.enter_context((job.folder / LOG).open("ab"))
                if not _try_lock(log):
                    if job.name not in self._option_value:
                        self._option_value.add(job.name)
                        self._observer.waiting(job)
                    return False
                earlier = None if self._rerun else earlier_result(job)
                if earlier is not None and is_over(job, earlier):
                    self._record(job, earlier.model_copy(update={"earlier": True}), skipped=True)
                    return True
                self._start(job, log, goes_on(job, earlier))
                opened.pop_all()
        except OSError as error:
            raise OutputError(
                f"{job.folder}: the job cannot be started there ({error.strerror or error}); "
                "choose another --out, or free some space"
            ) from error
        return True

    def _start(self, job: Job, log: BinaryIO, continues: bool) -> None:
        """Start the process, which inherits the log and its lock until its result is written."""
        if not continues:
            log.truncate(0)
            checkpoint_path(job.recipe.output_path).unlink(missing_ok=True)
        begun = pending(job).model_copy(
            update={"state": "running", "fingerprint": job.identity, "versions": versions()}
        )
        save(job, begun)
        older = _stamp(job.recipe.output_path)
        with atomic_file(job.folder / RECIPE) as file:
            file.write(job.recipe_text.encode())
        process = subprocess.Popen(
            [*self._command, str(job.folder / RECIPE)],
            stdin=subprocess.PIPE,  # the pipe that the job watches
            stdout=log,
            stderr=log,
            env=self._environment(),
            start_new_session=True,
        )
        self._running.append(_Running(job, process, begun, log, older))
        self.results[job.name] = begun
        self._observer.began(job, continues)
        self._changed()

    def _environment(self) -> dict[str, str]:
        environment = without_launcher(os.environ) | {PARENT_PIPE: "1"}
        if self._max_parallel > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // self._max_parallel)))
        return environment

    def _collect_ended(self) -> None:
        """Record the jobs whose processes have ended."""
        for each in list(self._running):
            code = each.process.poll()
            if code is not None:
                self._running.remove(each)
                self._over(each, code)

    def _over(self, each: _Running, code: int) -> None:
        each.end_group()
        assert each.process.stdin is not None
        each.process.stdin.close()
        by_signal = code < 0 or code in (130, 143)
        result = each.begun.model_copy(
            update={
                "state": "done" if code == 0 else "interrupted" if by_signal and self.stopped else "failed",
                "exit_code": code if code >= 0 else 128 - code,
                "seconds": round(time.monotonic() - each.start, 3),
                "message": _message(each.job, code),
            }
        )
        # a missed budget leaves a file too; an older file says nothing about this run
        has_file = code == 0 or (code == GATE and _stamp(each.job.recipe.output_path) != each.older)
        with each.log:
            self._record(each.job, add_measurements(each.job, result) if has_file else result)

    def _record(self, job: Job, result: JobResult, *, skipped: bool = False) -> None:
        self.results[job.name] = result
        if not skipped:
            save(job, result)
            self._changed()
        if result.state == "failed" and self._fail_fast:
            self._waiting.clear()
        self._observer.ended(job, result)

    def _end_all(self) -> None:
        """End all processes that were started, however the batch ends."""
        for each in self._running:
            each.end_group()
        while self._running:
            each = self._running.pop()
            code = each.process.wait()
            self.stopped = self.stopped or signal.SIGTERM
            self._over(each, code)


def _try_lock(log: BinaryIO) -> bool:
    """Try to lock a log, for as long as this file, or a process that inherited it, is open."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _message(job: Job, code: int) -> str:
    if code == 0:
        return ""
    if code < 0:
        return f"ended by {_signal_name(-code)}" + ("; too little memory?" if -code == signal.SIGKILL else "")
    last = "".join(log_tail(job, 1))
    return last.removeprefix(PROGRAM)[:1000]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _stamp(path: Path) -> object:
    """Return inode and mtime, to detect that the file was replaced; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
