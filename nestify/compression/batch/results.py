"""What became of a job: read from its folder, judged, and written there again."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nestify.compression.batch.jobs import LOG, RECIPE, RESULT, Job
from nestify.errors import BadFileError
from nestify.file.summary import read_report
from nestify.files import atomic_file, checkpoint_path

SCHEMA_VERSION = 1

State = Literal["pending", "running", "done", "failed", "interrupted"]

GATE, BAD_USAGE, BAD_INPUT = 1, 2, 3
_SERIOUS = (70, 4, BAD_INPUT, BAD_USAGE, GATE)
_LOG_TAIL_BYTES = 2**14


class JobResult(BaseModel):
    """One job, as `result.json` and a line of `results.jsonl` tell it.

    Attributes:
        name, recipe, options: the job, the file it comes from, and its share of the matrix.
        state: pending: not begun; running: also of a job that was cut off and could not say so.
        earlier: whether it was over in an earlier batch, and skipped by this one.
        exit_code: of its process; 128 + the signal's number where one ended it.
        seconds: that its process took, of the last one where it went on.
        message: the last line of its log where it did not end well.
        fingerprint: of all that the result depends on. `versions`: of what else a checkpoint depends on.
        file, bytes: the nested file's name in the job's folder, and its size.
        top1: percent, of the levels, core first.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    schema_version: Literal[1] = 1
    name: str
    recipe: str
    options: dict[str, Any] = {}
    state: State = "pending"
    earlier: bool = False
    exit_code: int | None = None
    seconds: float | None = None
    message: str = ""
    fingerprint: str = ""
    versions: dict[str, str] = {}
    file: str | None = None
    bytes: int | None = None
    top1: list[float | None] = []


def pending(job: Job) -> JobResult:
    """Of a job that has not begun."""
    return JobResult(name=job.name, recipe=job.source, options=dict(job.options))


def earlier_result(job: Job) -> JobResult | None:
    """What the job's folder says of the last run; None if nothing that can be read."""
    try:
        return JobResult.model_validate_json((job.folder / RESULT).read_bytes())
    except (OSError, ValidationError):
        return None


def is_over(job: Job, earlier: JobResult | None) -> bool:
    """Whether an earlier run made what this job would make, and it is still there.

    A file that missed a gate or a budget counts: it would miss it again.
    """
    return (
        earlier is not None
        and (earlier.state, earlier.exit_code) in (("done", 0), ("failed", GATE))
        and earlier.fingerprint == job.identity
        and earlier.bytes is not None
        and earlier.bytes == _size(job.recipe.output_path)
    )


def goes_on(job: Job, earlier: JobResult | None) -> bool:
    """Whether a checkpoint in the folder is of this job, so that the job may go on from it."""
    return (
        earlier is not None
        and checkpoint_path(job.recipe.output_path).exists()
        and (earlier.fingerprint, earlier.versions) == (job.identity, versions())
        and earlier.exit_code != BAD_USAGE  # the checkpoint was refused, as on another kind of device
        and _text(job.folder / RECIPE) == job.recipe_text
    )


def versions() -> dict[str, str]:
    """Of the packages that a checkpoint is bound to."""
    found = {}
    for package in ("torch", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def measured(job: Job, result: JobResult) -> JobResult:
    """The result with what the nested file says; one that cannot be read is a failure."""
    output = job.recipe.output_path
    try:
        report = read_report(output)
    except BadFileError as error:
        if result.exit_code != 0:
            return result
        return result.model_copy(
            update={"state": "failed", "exit_code": BAD_INPUT, "message": str(error).split("\n")[0]}
        )
    return result.model_copy(
        update={
            "file": output.name,
            "bytes": _size(output),
            "top1": [level.top1 for level in report.levels],
        }
    )


def save(job: Job, result: JobResult) -> None:
    """Write a job's `result.json`.

    Raises:
        OutputError: if it cannot be written.
    """
    with atomic_file(job.folder / RESULT) as file:
        file.write((result.model_dump_json(indent=2) + "\n").encode())


def exit_code(results: Iterable[JobResult], signal: int | None = None) -> int:
    """The code of a batch: 0 if all is done, else that of the most serious job.

    70 counts more than 4, 3, 2 and 1, in this order; any other code, as of a job that a signal ended, is 3.

    Args:
        signal: that ended the batch, which is told before all else: 130 for SIGINT, 143 for others.
    """
    if signal is not None:
        return 130 if signal == 2 else 143
    codes = {result.exit_code for result in results} - {0, None}
    known = {code if code in _SERIOUS else BAD_INPUT for code in codes}
    return next((code for code in _SERIOUS if code in known), 0)


def log_tail(job: Job, lines: int) -> list[str]:
    """The last lines of a job's log that have something in them."""
    try:
        with (job.folder / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-lines:]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
