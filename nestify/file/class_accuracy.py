"""Accuracy by class that `nestify eval` saved next to a nested file. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
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
from nestify.file.manifest import Label, Many
from nestify.file.reader import NestedFile
from nestify.file.untrusted import quoted
from nestify.machine import printable_line
from nestify.recipe.levels import MAX_LEVELS

ENDING = ".eval.json"
MAX_BYTES = 2**26
_WHAT = "accuracies"

Images = Annotated[int, Field(ge=0, le=2**40)]


class LevelClasses(Part):
    """How many images of each class a level predicted correctly.

    Attributes:
        level: number of the level, 1 for the core level.
        name: name of the level.
        images: number of images of each class that the level predicts, by index.
        correct: number of these whose class was predicted.
    """

    level: Annotated[int, Field(ge=1, le=MAX_LEVELS)]
    name: Label
    images: Many[Images]
    correct: Many[Images]


class ClassAccuracy(Document):
    """The accuracy of levels by class, on one set of images.

    Attributes:
        data: the images, as the user named them.
        date: date and time, in UTC.
        levels: counts of each level, in ascending order.
    """

    data: Annotated[Label, Field(max_length=200)]
    date: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
    levels: Annotated[Many[LevelClasses], Field(min_length=1, max_length=MAX_LEVELS)]


@dataclass(frozen=True)
class SavedAccuracy:
    """What is saved next to a file.

    Attributes:
        accuracy: the accuracy by class; None if there is none.
        problem: why the document cannot be used; empty if nothing is wrong.
    """

    accuracy: ClassAccuracy | None = None
    problem: str = ""


def read_class_accuracy(file: NestedFile) -> SavedAccuracy:
    """Read the accuracy by class next to a nested file. Problems are returned, not raised."""
    try:
        document = _read(file)
    except BadFileError as error:
        return SavedAccuracy(problem=str(error))
    if document is not None and document.header_sha256 != header_sha256(file):
        return SavedAccuracy(
            problem=f"{document_path(file, ENDING)}: holds accuracies of another file; evaluate this "
            "one with `nestify eval` and --save"
        )
    return SavedAccuracy(document)


def check_evaluation_savable(file: NestedFile) -> None:
    """Check, before anything is evaluated, that the accuracy by class can be saved next to a file.

    Raises:
        BadFileError: if the file has an address, or the existing document does not hold accuracies.
    """
    check_local(file, _WHAT)
    _read(file)


def save_class_accuracy(file: NestedFile, data: str, levels: Sequence[LevelClasses]) -> Path:
    """Save the accuracy by class next to a nested file; an earlier one is replaced.

    Args:
        file: the nested file.
        data: the images, as the user named them.
        levels: counts of each level, in ascending order.

    Returns:
        The path of the document, which is written atomically.

    Raises:
        BadFileError: see `check_evaluation_savable`.
        OutputError: if it cannot be written.
    """
    check_evaluation_savable(file)
    document = ClassAccuracy(
        header_sha256=header_sha256(file),
        data=printable_line(data),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        levels=list(levels),
    )
    return write_document(file, ENDING, document)


def _read(file: NestedFile) -> ClassAccuracy | None:
    return read_document(file, ENDING, ClassAccuracy, MAX_BYTES, partial(_check_levels, file), _WHAT)


def _check_levels(file: NestedFile, document: ClassAccuracy) -> None:
    """Refuse levels or numbers of classes that the file does not have, and impossible counts.

    Raises:
        ValueError: with what does not fit.
    """
    names = [level.name for level in file.manifest.levels]
    numbers = [level.level for level in document.levels]
    if numbers != sorted(set(numbers)):
        raise ValueError("levels are not in ascending order")
    for level in document.levels:
        if level.level > len(names) or level.name != names[level.level - 1]:
            raise ValueError(f"there is no level {level.level} named {quoted(level.name)}")
        classes = file.manifest.num_classes(level.level)
        if not len(level.images) == len(level.correct) == classes:
            raise ValueError(f"level {level.level} predicts {classes} classes")
        if any(right > images for right, images in zip(level.correct, level.images, strict=True)):
            raise ValueError(f"level {level.level} has more correct predictions than images")
