"""Class names and labels of a data set, and how its classes map to those of a model."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
) -> Classes:
    """Map a data set's classes to those of a model.

    Classes are matched by name if both have names; the data may then have a part of the model's classes.
    Otherwise the numbers of classes must be equal.

    Args:
        source: what messages call the data set.
        found: the data set's class names.
        wanted: the model's class names.
        count: the model's number of classes, which equals that of `wanted` if given.

    Raises:
        DataError: if the model lacks a class, or the numbers of classes differ.
    """
    count = count if wanted is None else len(wanted)
    if found is None:
        return Classes(None if wanted is None else tuple(wanted), count)
    if wanted is not None:
        index = {name: i for i, name in enumerate(wanted)}
        if unknown := [name for name in found if name not in index]:
            raise DataError(
                f"{source}: class {_list_few(unknown)} is not among the model's {len(wanted)} classes "
                f"({_list_few(wanted)}); rename or remove the classes that the model does not have"
            )
        return Classes(tuple(wanted), count, tuple(index[name] for name in found))
    if count is not None and len(found) != count:
        raise DataError(
            f"{source}: {len(found)} classes ({_list_few(found)}), but the model has {count}; without the "
            "model's class names the numbers must be the same"
        )
    if len(found) < 2:
        raise DataError(f"{source}: only one class, {found[0]!r}; a classifier needs two or more")
    return Classes(found, len(found))


def check_class_folders(source: Split, dataset: Any, names: Sequence[str]) -> None:
    """Refuse images outside class folders, and class folders without images, because timm ignores both.

    Raises:
        DataError: if there are any; it names the folder.
    """
    root = Path(source.root or "")
    if "" in names or "." in names:
        raise DataError(
            f"{root}: images are outside class folders; put each into the folder of its class, such as "
            f"{root.stem}/cat/1.jpg"
        )
    if not root.is_dir():
        return
    # classes are named after the folder that directly holds the images, so only other folders are checked
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir() and entry.name not in names):
        if folder.name.startswith(".") or _holds_any(folder, dataset):
            continue
        endings = Counter(file.suffix or "no ending" for file in folder.rglob("*") if file.is_file())
        holds = ", ".join(f"{n} x {ending}" for ending, n in endings.most_common(3)) or "nothing"
        raise DataError(
            f"{folder}: no .png, .jpg or .jpeg images in this class folder; it holds {holds}; "
            "convert them, or remove the folder"
        )


def _holds_any(folder: Path, dataset: Any) -> bool:
    inside = str(folder) + os.sep
    return any(str(path).startswith(inside) for path, _ in dataset.reader.samples)


def _list_few(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
