"""Class names and labels of a data set, and how its classes map to those of a model."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from nestify.data.source import Split
from nestify.errors import DataError


@dataclass(frozen=True)
class Classes:
    """The label space of a data set.

    Attributes:
        names: class names by index; None if not known.
        count: number of classes; None if not known.
        index_of: class index for each of the data set's own indices; None if they are the same.
    """

    names: tuple[str, ...] | None
    count: int | None
    index_of: tuple[int, ...] | None = None


def names_in(dataset: Any) -> tuple[str, ...] | None:
    """Return the data set's class names in the order of its labels; None if it has none."""
    reader = getattr(dataset, "reader", None)
    if reader is None:  # torchvision
        names = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None) or ()
        return tuple(names) if names and all(isinstance(name, str) for name in names) else None
    to_index = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return tuple(sorted(to_index, key=to_index.__getitem__)) if to_index else None


def labels_in(dataset: Any, source: Split) -> NDArray[np.int64]:
    """Return the label of every image, (n,), without reading an image.

    Raises:
        DataError: if the data set does not list its labels, or they are not one class per image.
    """
    reader: Any = getattr(dataset, "reader", None)
    found: Any
    if hasattr(reader, "iter_targets"):
        found = list(reader.iter_targets())
    elif hasattr(reader, "samples") and not hasattr(reader, "targets"):
        found = [label for _, label in reader.samples]
    else:
        found = getattr(dataset if reader is None else reader, "targets", None)
    if found is None:
        raise DataError(f"{source}: it does not list its labels, so no part of it can be chosen by class")
    labels: NDArray[Any] = np.asarray(found)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{source}: its labels are not one class per image; nestify needs single labels")
    return labels.astype(np.int64)


def fit_classes(
    source: Split,
    found: tuple[str, ...] | None,
    wanted: Sequence[str] | None = None,
    count: int | None = None,
    least: int = 2,
) -> Classes:
    """Map a data set's classes to those of a model.

    Classes are matched by name if both have names; the data may then have a part of the model's classes.
    Otherwise the numbers of classes must be equal.

    Args:
        source: what messages call the data set.
        found: the data set's class names.
        wanted: the model's class names.
        count: the model's number of classes, which equals that of `wanted` if given.
        least: number of classes that the data must have.

    Raises:
        DataError: if the model lacks a class, or the numbers of classes differ.
    """
    count = count if wanted is None else len(wanted)
    if found is None:
        return Classes(None if wanted is None else tuple(wanted), count)
    if wanted is not None:
        # macOS and Linux store the same name in different Unicode forms
        index = {normalize("NFC", name): i for i, name in enumerate(wanted)}
        forms = {name: normalize("NFC", name) for name in found}
        if unknown := [name for name in found if forms[name] not in index]:
            raise DataError(
                f"{source}: class {list_few(unknown)} is not among the model's {len(wanted)} classes "
                f"({list_few(wanted)}); rename or remove the classes that the model does not have, name the "
                "splits (--train-split, --val-split) if they are splits, or use no classes (--unlabelled)"
            )
        return Classes(tuple(wanted), count, tuple(index[forms[name]] for name in found))
    if count is not None and len(found) != count:
        raise DataError(
            f"{source}: {len(found)} classes ({list_few(found)}), but the model has {count}; without the "
            "model's class names the numbers must be the same; if the folders are not classes, evaluate "
            "without (--unlabelled)"
        )
    if len(found) < least:
        raise DataError(
            f"{source}: only one class, {found[0]!r}; a classifier needs two or more; if this is not a "
            "class, compress and evaluate without classes (--unlabelled)"
        )
    return Classes(found, len(found))


def read_class_names(path: str) -> list[str]:
    """Read class names from a file: one per line, in the order of the classifier's outputs.

    Raises:
        DataError: if it cannot be read, or has an empty or repeated name.
    """
    hint = "--class-names takes a file with one class name per line, in the order of the model's outputs"
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file; {hint}")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {hint}") from error
    names = [line.strip() for line in lines]
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        first = seen.setdefault(normalize("NFC", name), number)
        if not name or first != number:
            problem = f"repeats line {first}, {name!r}" if name else "is empty"
            raise DataError(f"{path}: line {number} {problem}; {hint}")
    if len(names) < 2:
        raise DataError(f"{path}: fewer than two names; {hint}")
    return names


def list_few(names: Sequence[str], limit: int = 5) -> str:
    """Return the first names, quoted, for messages."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
