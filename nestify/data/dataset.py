"""One split of a data set: its images, its classes, and the images that were skipped."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestify.data.classes import Classes, fit_classes, labels_in, list_few, names_in, read_class_names
from nestify.data.labels import read_labels
from nestify.data.source import Split, locate_split, open_split
from nestify.errors import DataError, RecipeError
from nestify.recipe.options import OnBadImage


@dataclass(frozen=True, eq=False)
class Images:
    """Images of one split, to be loaded by `train_loader` or `eval_loader`; nothing is decoded yet.

    Attributes:
        source: where the images are.
        classes: label space of the targets that loaders return.
        dataset: timm's or torchvision's data set.
        indices: indices of the images in it, int64, ascending; None for a stream, which is used completely.
        on_bad_image: what a loader does with an image that cannot be read.
        labelled: whether labels are used; if not, every target is 0, and images are chosen as from one class.
        multi_label: whether an image may have several labels; targets are then (classes,), 1 for each of
            them, and images are chosen as from one class.
        skipped: why each skipped image could not be read, by file name; filled by loaders.
    """

    source: Split
    classes: Classes
    dataset: Any
    indices: NDArray[np.int64] | None
    on_bad_image: OnBadImage = "refuse"
    labelled: bool = True
    multi_label: bool = False
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of images, unreadable ones included; 0 for a stream of unknown length."""
        if self.indices is None:
            return int(getattr(self.dataset.reader, "num_samples", 0) or 0)
        return len(self.indices)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Class names by index; None if neither the data nor the caller has them."""
        return self.classes.names

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if neither the data nor the caller has it."""
        return self.classes.count

    def file_name(self, index: int) -> str:
        """Return what messages call an image of `dataset`: its path, or its position."""
        reader = getattr(self.dataset, "reader", None)
        name = reader.filename(index, absolute=True) if reader is not None else None
        if not name:
            return f"{self.source}, image {index}"
        return f"{self.source}:{name}" if self.source.is_tar else str(name)

    def inner_names(self) -> list[str]:
        """Return the names of the images within their source; none for a named data set or a stream."""
        if self.source.name or self.indices is None:
            return []
        name = self.dataset.reader.filename
        return [str(name(index)) for index in self.indices.tolist()]

    def check_delivered(self, count: int) -> None:
        """Check that a pass over a stream delivered all images; webdataset passes bad ones over.

        A training stream repeats images to fill its batches, and is not checked.

        Args:
            count: number of images that were delivered.

        Raises:
            DataError: if images are missing and the images say `refuse`; otherwise they count as skipped.
        """
        missing = len(self) - count
        if missing > 0 and self.on_bad_image == "refuse":
            raise DataError(
                f"{self.source}: {missing} of {len(self)} images were not delivered; some may be damaged, so "
                "replace them, or pass --on-bad-image skip"
            )
        if missing > 0:
            self.skipped[str(self.source)] = f"{missing} images were not delivered"

    def unreadable(self) -> DataError:
        """Return the error for a pass in which no image could be read."""
        return DataError(f"{self.source}: none of its images could be read")

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences about files that were left out, and about how classes were found."""
        return tuple(getattr(getattr(self.dataset, "reader", None), "notices", ()))

    @property
    def order_notice(self) -> str | None:
        """A sentence on the order of the classes, if other programs order the same folders differently.

        None if they do not, if the order was given, or if it does not come from names of folders.
        """
        names = self.class_names
        if self.source.name or self.classes.index_of is not None or names is None or self.multi_label:
            return None
        if list(names) == (others := sorted(names)):
            return None
        return (
            f"{self.source}: the classes are in natural order ({list_few(names)}), which differs from the "
            f"lexicographic order of other programs ({list_few(others)})"
        )

    def at_most(self, limit: int | None, seed: int = 0) -> "Images":
        """Return at most `limit` images, balanced over the classes; None for all of them.

        Raises:
            DataError: if this is a stream.
            RecipeError: if the limit is below 1.
        """
        if limit is None:
            return self
        if limit < 1:
            raise RecipeError(f"a limit of {limit} images leaves no images; use 1 or more")
        places = self._places_in_class(seed)
        # first every class's first image, then every class's second one, ...; ties in any seeded order
        ties = np.random.default_rng([seed, 1]).permutation(len(places))
        return self._part(np.lexsort((ties, places))[:limit])

    def without_labels(self) -> "Images":
        """Return the same images with their labels unused."""
        return replace(self, labelled=False, skipped={})

    def hold_out(self, share: float, seed: int = 0) -> tuple["Images", "Images"]:
        """Split into the remaining images and `share` of each class.

        A class of two or more images has at least one in both parts; a single image remains.

        Raises:
            DataError: if this is a stream, or no class has two images.
            RecipeError: if the share is not in (0, 1).
        """
        if not 0 < share < 1:
            raise RecipeError(f"--holdout {share:g} is not in (0, 1); 0.1 sets every tenth image aside")
        places = self._places_in_class(seed)
        _, inverse, counts = np.unique(self._labels(), return_inverse=True, return_counts=True)
        held = np.minimum(np.maximum(np.rint(counts * share), 1), counts - 1)
        out = places < held[inverse]
        if not out.any() and (not self.labelled or self.multi_label):
            raise DataError(f"{self.source}: one image is too few to hold images out")
        if not out.any():
            raise DataError(f"{self.source}: no class has two images, so none can be held out")
        return self._part(np.flatnonzero(~out)), self._part(np.flatnonzero(out))

    def single_image_classes(self) -> list[str]:
        """Return the names of the classes that have one image; none for named data sets and streams."""
        if self.source.name or self.indices is None or self.class_names is None or self.multi_label:
            return []
        labels, counts = np.unique(self._labels(), return_counts=True)
        index_of = self.classes.index_of or range(len(self.class_names))
        return [self.class_names[index_of[label]] for label in labels[counts == 1]]

    def class_counts(self, num_classes: int) -> list[int]:
        """Return the number of images of each class, or with each label.

        Args:
            num_classes: number of classes.

        Raises:
            DataError: if the images are a stream, whose labels are not known in advance.
        """
        if self.indices is None:
            raise DataError(
                f"{self.source}: the images of each class of a stream are not known in advance; leave out "
                "train.class_weights"
            )
        labels = self._labels()
        if self.multi_label:
            labels = np.array([label for row in self.label_rows() for label in row], dtype=np.int64)
        if self.classes.index_of is not None:
            labels = np.asarray(self.classes.index_of, dtype=np.int64)[labels]
        return [int(count) for count in np.bincount(labels, minlength=num_classes)]

    def label_rows(self) -> list[tuple[int, ...]]:
        """Return the data set's indices of the labels of each image, if it may have several."""
        assert self.multi_label
        assert self.indices is not None
        targets = self.dataset.reader.targets
        return [targets[index] for index in self.indices]

    def _labels(self) -> NDArray[np.int64]:
        if self.indices is None:
            raise DataError(
                f"{self.source}: a stream cannot be divided; leave out --holdout and --max-images, or use "
                "a folder, a tar or hfds/"
            )
        if not self.labelled or self.multi_label:
            return np.zeros(len(self.indices), dtype=np.int64)
        return labels_in(self.dataset, self.source)[self.indices]

    def _places_in_class(self, seed: int) -> NDArray[np.int64]:
        """Return each image's position, from 0, in a shuffled queue of its class; (len(self),)."""
        labels = self._labels()
        order = np.random.default_rng(seed).permutation(len(labels))
        order = order[np.argsort(labels[order], kind="stable")]
        _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
        places = np.empty_like(order)
        places[order] = np.arange(len(order)) - np.repeat(starts, counts)
        return places

    def _part(self, positions: NDArray[np.int64]) -> "Images":
        assert self.indices is not None
        return replace(self, indices=self.indices[np.sort(positions)], skipped={})


def open_images(
    data: str,
    split: str = "validation",
    *,
    data_root: str | None = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    labelled: bool = True,
    labels: str | None = None,
    on_bad_image: OnBadImage = "refuse",
    max_images: int | None = None,
    seed: int = 0,
) -> Images:
    """Open one split of a data set.

    Args:
        data: a folder, a tar, or one of timm's data sets by name; see `source.locate_split`.
        split: `train`, `validation`, or the data set's own name; `.` is the folder itself.
        data_root: folder of a data set that is given by name.
        class_names: class names of the model, by index. The data's classes are mapped to them by name; there
            may be fewer, and the model must have all of them.
        num_classes: number of classes of a model without names; the data must have the same number.
        labelled: whether labels are read. Without them the images of a folder or tar may lie in any folder,
            and neither names nor number of classes are compared with the data.
        labels: CSV table of the labels of each image in a folder or tar, in place of class folders; see
            `labels`.
        on_bad_image: `refuse` raises a `DataError` at the first image that cannot be read; `skip` continues
            without it and records its name in `Images.skipped`. A stream ends at an unreadable image in
            both cases, except webdataset, which skips it.
        max_images: maximum number of images, balanced over the classes.
        seed: seed of the choice of `max_images`.

    Raises:
        DataError: if the images are missing, empty or damaged, or their classes do not fit.
        RecipeError: if an option has no meaning for this data.
    """
    source = locate_split(data, split, data_root)
    table = read_labels(labels) if labelled and labels is not None else None
    dataset = open_split(source, class_names, labelled, table)
    found = names_in(dataset) if labelled else None
    classes = fit_classes(source, found, class_names, num_classes, least=2 if table is None else 1)
    indices = None if source.is_stream else np.arange(len(dataset))
    images = Images(source, classes, dataset, indices, on_bad_image, labelled, table is not None)
    return images.at_most(max_images, seed)


def open_splits(
    data: str,
    *,
    train_split: str = "train",
    validation_split: str = "validation",
    holdout: float | None = None,
    data_root: str | None = None,
    class_names: Sequence[str] | str | None = None,
    num_classes: int | None = None,
    labelled: bool = True,
    labels: str | None = None,
    on_bad_image: OnBadImage = "refuse",
    max_images: int | None = None,
    max_validation_images: int | None = None,
    seed: int = 0,
) -> tuple[Images, Images]:
    """Open the training and validation images, in the label space of the training images.

    Args:
        holdout: share of each class of the training split to use for validation, in place of a validation
            split.
        class_names: class names by index, or a file of them, one per line.
        max_images: maximum number of training images.
        max_validation_images: maximum number of validation images.
        seed: seed of the choice of images.

    The other arguments are those of `open_images`.

    Raises:
        DataError: see `open_images`; also if both splits are the same images.
        RecipeError: if an option has no meaning for this data.
    """
    given: dict[str, Any] = {
        "data_root": data_root,
        "labelled": labelled,
        "labels": labels,
        "on_bad_image": on_bad_image,
    }
    if holdout is None and locate_split(data, train_split, data_root).overlaps(
        validation := locate_split(data, validation_split, data_root)
    ):
        remedy = "name the splits with --train-split and --val-split"
        if validation.is_tar:
            remedy = "a tar is one split: give a folder with a tar of each, such as train.tar and val.tar"
        raise DataError(
            f"{validation}: training and validation would use the same images; {remedy}, or set training "
            "images aside with --holdout 0.1"
        )
    if isinstance(class_names, str):
        class_names = read_class_names(class_names)
    train = open_images(data, train_split, class_names=class_names, num_classes=num_classes, **given)
    if holdout is not None:
        train, validation_images = train.hold_out(holdout, seed)
    else:
        validation_images = open_images(
            data,
            validation_split,
            class_names=train.class_names,
            num_classes=train.num_classes,
            **given,
        )
        _refuse_shared_folders(train, validation_images)
    return train.at_most(max_images, seed), validation_images.at_most(max_validation_images, seed)


def _refuse_shared_folders(train: Images, validation: Images) -> None:
    """Refuse training and validation images that are the same by links.

    Raises:
        DataError: if they are.
    """
    ours, theirs = (
        getattr(getattr(images.dataset, "reader", None), "folders", {}) for images in (train, validation)
    )
    for identity in ours.keys() & theirs.keys():
        raise DataError(
            f"{theirs[identity]} and {ours[identity]} are the same folder, by a link; training and "
            "validation would use the same images, so remove the link"
        )
