"""The result of a job, which is stored in its folder."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nestify.addresses import hide_passwords
from nestify.compression.batch.jobs import LOG, RECIPE, RESULT, Job
from nestify.errors import BadFileError
from nestify.file.summary import read_report
from nestify.files import atomic_file, checkpoint_path
from nestify.recipe.metric import TOP1

SCHEMA_VERSION = 1

State = Literal["pending", "running", "done", "failed", "interrupted"]

GATE, BAD_USAGE, BAD_INPUT = 1, 2, 3
_SERIOUS = (70, 4, BAD_INPUT, BAD_USAGE, GATE)
_LOG_TAIL_BYTES = 2**14


class JobResult(BaseModel):
    """One job, as stored in `result.json` and a line of `results.jsonl`.

    Attributes:
        name: name of the job.
        recipe: the recipe that it comes from.
        options: options of the recipe's matrix and of --set.
        state: `pending`: not started; `running`: also a job that was killed.
        earlier: whether an earlier batch finished it, so that this one skipped it.
        exit_code: exit code of its process; 128 + the signal's number if a signal ended it.
        seconds: seconds of its process, the last one if it resumed.
        message: last line of its log if it failed.
        fingerprint: hash of everything that the result depends on.
        versions: versions of packages that a checkpoint depends on.
        file: name of the nested file in the job's folder.
        bytes: size of the nested file.
        metric: what the levels are judged by; see `recipe.metric`.
        scores: scores of the levels in percent, core first.
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
    metric: str = TOP1.key
    scores: list[float | None] = []


def pending(job: Job) -> JobResult:
    """Return the result of a job that has not started."""
    return JobResult(name=job.name, recipe=job.source, options=dict(job.options))


def earlier_result(job: Job) -> JobResult | None:
    """Read the result of the last run from the job's folder; None if there is none."""
    try:
        return JobResult.model_validate_json((job.folder / RESULT).read_bytes())
    except (OSError, ValidationError):
        return None


def is_over(job: Job, earlier: JobResult | None) -> bool:
    """Return whether an earlier run made the result of this job, and it still exists.

    A file that missed a gate or a budget counts, because it would miss it again.
    """
    return (
        earlier is not None
        and (earlier.state, earlier.exit_code) in (("done", 0), ("failed", GATE))
        and earlier.fingerprint == job.identity
        and earlier.bytes is not None
        and earlier.bytes == _size(job.recipe.output_path)
    )


def goes_on(job: Job, earlier: JobResult | None) -> bool:
    """Return whether a checkpoint in the folder belongs to this job, so that it can resume."""
    return (
        earlier is not None
        and checkpoint_path(job.recipe.output_path).exists()
        and (earlier.fingerprint, earlier.versions) == (job.identity, versions())
        and earlier.exit_code
        != BAD_USAGE  # the checkpoint was refused, for example on another kind of device
        and _text(job.folder / RECIPE) == job.recipe_text
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages that a checkpoint depends on."""
    found = {}
    for package in ("torch", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def add_measurements(job: Job, result: JobResult) -> JobResult:
    """Add what the nested file says to a result; an unreadable file is a failure."""
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
            "metric": report.metric.key,
            "scores": [level.score for level in report.levels],
        }
    )


def save(job: Job, result: JobResult) -> None:
    """Write a job's `result.json`.

    Raises:
        OutputError: if it cannot be written.
    """
    with atomic_file(job.folder / RESULT) as file:
        file.write((hide_passwords(result.model_dump_json(indent=2)) + "\n").encode())


def exit_code(results: Iterable[JobResult], signal: int | None = None) -> int:
    """Return the exit code of a batch: 0 if all jobs are done, else that of the most serious job.

    70 counts more than 4, 3, 2 and 1, in this order; any other code, such as that of a signal, is 3.

    Args:
        jobs: the results.
        signal: signal that ended the batch, which decides first: 130 for SIGINT, 143 for others.
    """
    if signal is not None:
        return 130 if signal == 2 else 143
    codes = {result.exit_code for result in results} - {0, None}
    known = {code if code in _SERIOUS else BAD_INPUT for code in codes}
    return next((code for code in _SERIOUS if code in known), 0)


def log_tail(job: Job, lines: int) -> list[str]:
    """Return the last non-empty lines of a job's log."""
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
