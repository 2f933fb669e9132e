"""Measured latencies of a nested file, and the document next to it that stores them. Does not import torch.

The document is not part of the nested file, whose header identifies the source of slices and must not change.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from nestify.errors import BadFileError
from nestify.file.beside import (
    Document,
    Part,
    check_local,
    document_path,
    header_sha256,
    read_document,
    write_document,
)
from nestify.file.manifest import FromList, Label, Many
from nestify.file.reader import NestedFile
from nestify.file.untrusted import quoted
from nestify.recipe.levels import LONGEST_NAME, MAX_LEVELS

ENDING = ".bench.json"
_WHAT = "measurements"
MAX_BYTES = 2**20
MAX_MEASUREMENTS = 256
"""Largest number of measurements in a document; the oldest are removed first."""

Text = Annotated[Label, Field(max_length=LONGEST_NAME)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=2**31)]
TORCH = "torch"
"""Runtime of measurements that do not name one."""

ENGINE = "engine"
"""First word of the runtime of measurements of the sparse engine; the versions that it depends on follow."""

FLOAT32, INT8 = "float32", "int8"
"""Types that networks compute in."""


class Machine(Part):
    """The machine, as far as latencies depend on it.

    Attributes:
        cpu: model name of the processor.
        cores: number of processors that the process may use.
        device: type of the device, as torch calls it.
        device_name: model name of the device.
        system: operating system and architecture.
        torch: version of torch.
    """

    cpu: Text
    cores: Count
    device: Text
    device_name: Text
    system: Text
    torch: Text


class LevelLatency(Part):
    """One level, measured in turns with the full level.

    Attributes:
        level: number of the level, 1 for the core level.
        name: name of the level.
        median_seconds: median of the seconds for one batch.
        p95_seconds: 95th percentile of the seconds for one batch.
        over_full: median, over the rounds, of its time divided by the full level's in the same round.
        over_full_quartiles: first and third quartile of the same ratios.
    """

    level: Annotated[int, Field(ge=1, le=MAX_LEVELS)]
    name: Text
    median_seconds: Positive
    p95_seconds: Positive
    over_full: Positive
    over_full_quartiles: Annotated[tuple[Positive, Positive], FromList]


class Measurement(Part):
    """Levels that were measured together.

    Attributes:
        machine: the machine.
        threads: number of torch's CPU threads.
        batch_size: images per call.
        dtype: type that the network computes in.
        rounds: number of calls of each level.
        date: date and time, in UTC.
        levels: latency of each level, in ascending order.
        runtime: what ran the levels: torch, or the sparse engine with the versions that it depends on.
    """

    machine: Machine
    threads: Count
    batch_size: Count
    dtype: Text
    rounds: Count
    date: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
    levels: Annotated[Many[LevelLatency], Field(min_length=1, max_length=MAX_LEVELS)]
    runtime: Annotated[Text, Field(exclude_if=lambda runtime: runtime == TORCH)] = TORCH

    @property
    def conditions(self) -> tuple[Machine, int, int, str, str]:
        """The conditions of the measurement; a newer one replaces an older one with the same conditions."""
        return self.machine, self.threads, self.batch_size, self.dtype, self.runtime

    @property
    def on_engine(self) -> bool:
        """Whether the sparse engine ran the levels."""
        return self.runtime.partition(" ")[0] == ENGINE

    def images_per_second(self, level: LevelLatency) -> float:
        """Return the throughput of one of its levels."""
        return self.batch_size / level.median_seconds


class _Document(Document):
    """The document of measurements."""

    measurements: Annotated[Many[Measurement], Field(max_length=MAX_MEASUREMENTS)]


@dataclass(frozen=True)
class Measured:
    """The stored measurements of a file.

    Attributes:
        measurements: the measurements, oldest first.
        problem: why the document could not be used; empty if nothing is wrong.
    """

    measurements: Sequence[Measurement] = ()
    problem: str = ""


def read_measured(file: NestedFile) -> Measured:
    """Read the measurements next to a nested file; an address has none. Problems are returned, not raised."""
    try:
        document = _read(file)
    except BadFileError as error:
        return Measured(problem=str(error))
    if document is None:
        return Measured()
    if document.header_sha256 != header_sha256(file):
        return Measured(
            problem=f"{document_path(file, ENDING)}: holds measurements of another file; measure this "
            "one with `nestify bench` and --save"
        )
    return Measured(document.measurements)


def check_savable(file: NestedFile) -> None:
    """Check, before anything is measured, that measurements can be saved next to a file.

    Raises:
        BadFileError: if the file has an address, or the existing document does not hold measurements.
    """
    check_local(file, _WHAT)
    _read(file)


def save_measured(file: NestedFile, new: Sequence[Measurement]) -> Path:
    """Save measurements next to a file; those with the same conditions are replaced.

    Returns:
        The path of the document, which is written atomically.

    Raises:
        BadFileError: see `check_savable`.
        OutputError: if it cannot be written.
    """
    check_savable(file)
    replaced = {measurement.conditions for measurement in new}
    kept = [old for old in read_measured(file).measurements if old.conditions not in replaced]
    measurements = [*kept, *new][-MAX_MEASUREMENTS:]
    document = _Document(header_sha256=header_sha256(file), measurements=measurements)
    return write_document(file, ENDING, document)


def _read(file: NestedFile) -> _Document | None:
    """Read the untrusted document next to a file; None if there is none.

    Raises:
        BadFileError: if it is damaged, or not such a document.
    """
    return read_document(file, ENDING, _Document, MAX_BYTES, partial(_check_levels, file), _WHAT)


def _check_levels(file: NestedFile, document: _Document) -> None:
    names = [level.name for level in file.manifest.levels]
    for measurement in document.measurements:
        numbers = [level.level for level in measurement.levels]
        if numbers != sorted(set(numbers)):
            raise ValueError("levels are not in ascending order")
        for level in measurement.levels:
            if level.level > len(names) or level.name != names[level.level - 1]:
                raise ValueError(f"there is no level {level.level} named {quoted(level.name)}")
