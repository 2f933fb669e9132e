"""Which images validate: the record of those that `compress` held out, and how `eval` finds them again."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from nestify.data.classes import labels_in
from nestify.data.dataset import Images, open_images
from nestify.data.source import Split, locate_split
from nestify.errors import DataError
from nestify.file.manifest import HeldOut
from nestify.recipe.options import OnBadImage


@dataclass(frozen=True)
class UsedImages:
    """Which images an evaluation used.

    Attributes:
        used: `held-out`: those that `compress` held out of the training images; `all`: all of the split.
        source: the split, such as the path of a folder.
        count: number of images that were used, unreadable ones included.
        total: number of images of the split.
        trained: whether images that the levels were trained on are among them; None if that is not known.
        changed: whether the split differs from the one that the validation images were held out of.
        held_out: how they were held out; None if the file has validation images of another split.
    """

    used: Literal["held-out", "all"]
    source: str
    count: int
    total: int
    trained: bool | None
    changed: bool
    held_out: HeldOut | None


def record_held_out(images: Images, share: float, seed: int, split: str) -> HeldOut:
    """Return the record of how validation images were held out, for the manifest.

    Args:
        images: any images of the split that they were held out of.
        share: share of each class that was held out.
        seed: seed of the choice.
        split: name of the split.
    """
    return HeldOut(
        share=share,
        seed=seed,
        split=split,
        images=len(images.dataset),
        sha256=_hash_of_split(images),
        unlabelled=not images.labelled or images.multi_label,
    )


def _hash_of_split(images: Images) -> str:
    """Return the SHA-256 of the names and labels of all images of a split, on which the choice depends.

    Labels that are not used count as 0.
    """
    if images.labelled and not images.multi_label:
        labels = labels_in(images.dataset, images.source)
    else:
        labels = np.zeros(len(images.dataset), dtype=np.int64)
    names = replace(images, indices=np.arange(len(labels))).inner_names() or [""] * len(labels)
    digest = hashlib.sha256()
    for name, label in zip(names, labels.tolist(), strict=True):
        digest.update(f"{name}\0{label}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _is_split_of(held_out: HeldOut, images: Images) -> bool:
    """Return whether images are those that validation images were held out of."""
    return not images.source.is_stream and _hash_of_split(_as_chosen(images, held_out)) == held_out.sha256


def _divide(images: Images, held_out: HeldOut) -> tuple[Images, Images]:
    """Return the training and the validation images, as the run divided them."""
    parts = _as_chosen(images, held_out).hold_out(held_out.share, held_out.seed)
    train, validation = (replace(part, labelled=images.labelled) for part in parts)
    return train, validation


def _as_chosen(images: Images, held_out: HeldOut) -> Images:
    """Return images as the run chose from them: without labels if it had none."""
    return images.without_labels() if held_out.unlabelled else images


def open_evaluation_images(
    data: str,
    split: str | None,
    held_out: HeldOut | None,
    recorded: str | None = None,
    *,
    all_images: bool = False,
    labelled: bool = True,
    labels: str | None = None,
    data_root: str | None = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    on_bad_image: OnBadImage = "refuse",
    max_images: int | None = None,
    seed: int = 0,
) -> tuple[Images, UsedImages]:
    """Open the images to evaluate a nested file on.

    These are the images of a split, except where that is the split that the file's validation images were
    held out of: then only the held-out ones, which the levels were not trained on.

    Args:
        data: images, as for `open_images`.
        split: name of the split; None for `validation`, or else what the file was validated on: held-out
            images of the training split, or the split `recorded`.
        held_out: the file's record of how its validation images were held out; None if it has none.
        recorded: name of the split that the file was validated on; None if it is not known.
        all_images: whether to use the training images too.
        labels: CSV table of the labels of each image, in place of class folders.
        labelled: whether labels are read. If not, they are still read where the held-out images were chosen
            by them.

    The other arguments and errors are those of `open_images`.
    """
    trained_on = None if held_out is None else held_out.split
    where = _locate(data, split, trained_on or recorded, data_root)
    drawn = _locate_or_none(data, trained_on, data_root)
    overlaps = held_out is not None and drawn is not None and where.overlaps(drawn)
    open_with = partial(
        open_images,
        data,
        where.split,
        data_root=data_root,
        class_names=class_names,
        num_classes=num_classes,
        labels=labels,
        on_bad_image=on_bad_image,
    )
    if not labelled and overlaps and held_out is not None and not held_out.unlabelled:
        try:
            images = open_with()
        except DataError:
            images = open_with(labelled=False)
    else:
        images = open_with(labelled=labelled)
    total, trained, changed = len(images), None, False
    used: Literal["held-out", "all"] = "all"
    if held_out is not None and overlaps:
        changed = not _is_split_of(held_out, images)
        trained = None if changed else True
        if not (changed or all_images or split == held_out.split):
            images, used, trained = _divide(images, held_out)[1], "held-out", False
    images = images.at_most(max_images, seed)
    return images, UsedImages(
        used=used,
        source=str(images.source),
        count=len(images),
        total=total,
        trained=trained,
        changed=changed,
        held_out=held_out,
    )


def open_calibration_images(
    data: str,
    held_out: HeldOut | None,
    count: int,
    *,
    split: str | None = None,
    labelled: bool = True,
    labels: str | None = None,
    data_root: str | None = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> Images:
    """Open training images, without those that a nested file's validation images were held out of them.

    Args:
        data: images, as for `open_images`; all of them if there are no splits.
        held_out: the file's record of how its validation images were held out; None if it has none.
        count: number of images, balanced over the classes.
        split: name of the training split; None for that of `held_out`, or `train`.
        labelled: whether labels are read.

    The other arguments and errors are those of `open_images`.
    """
    images = open_images(
        data,
        split or ("train" if held_out is None else held_out.split),
        labelled=labelled,
        labels=labels,
        data_root=data_root,
        class_names=class_names,
        num_classes=num_classes,
    )
    if held_out is not None and _is_split_of(held_out, images):
        images = _divide(images, held_out)[0]
    return images.at_most(count, seed)


def _locate(data: str, split: str | None, otherwise: str | None, data_root: str | None) -> Split:
    """Locate the split to evaluate on: the named one, or `validation`, or else `otherwise`."""
    try:
        return locate_split(data, split or "validation", data_root)
    except DataError:
        found = None if split else _locate_or_none(data, otherwise, data_root)
        if found is None:
            raise
        return found


def _locate_or_none(data: str, split: str | None, data_root: str | None) -> Split | None:
    """Locate a split, if it is known and the data has it."""
    if split is None:
        return None
    try:
        return locate_split(data, split, data_root)
    except DataError:
        return None


def recorded_split(recipe: Mapping[str, object]) -> str | None:
    """Return the name of the split that a nested file was validated on, from the recipe in its manifest."""
    data = recipe.get("data")
    name = data.get("val_split") if isinstance(data, Mapping) else None
    return name if isinstance(name, str) else None
