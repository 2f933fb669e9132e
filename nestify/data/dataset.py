"""One split of a data set as nestify uses it: which images, which classes, and what was skipped."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestify.data.classes import Classes, check_class_folders, fit_classes, labels_in, names_in
from nestify.data.source import Source, locate, open_source
from nestify.errors import DataError, RecipeError
from nestify.recipe.options import OnBadImage


@dataclass(frozen=True, eq=False)
class Images:
    """Images of one split, to be loaded by `train_loader` or `eval_loader`. Nothing is decoded yet.

    Attributes:
        source: where they are.
        classes: the label space of the targets that loaders give.
        dataset: timm's or torchvision's data set.
        indices: which of its images, int64, ascending; None for a stream, which is taken whole.
        on_bad_image: what a loader does with an image that cannot be read.
        skipped: why each skipped image could not be read, by file name; loaders fill it.
    """

    source: Source
    classes: Classes
    dataset: Any
    indices: NDArray[np.int64] | None
    on_bad_image: OnBadImage = "refuse"
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of images, those that cannot be read included; 0 for a stream that does not tell."""
        if self.indices is None:
            return int(getattr(self.dataset.reader, "num_samples", 0) or 0)
        return len(self.indices)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """By class index; None where neither the data nor the caller names them."""
        return self.classes.names

    @property
    def num_classes(self) -> int | None:
        """None where neither the data nor the caller tells."""
        return self.classes.count

    def file_name(self, index: int) -> str:
        """What to call an image of `dataset` in a message: its path, or its place."""
        reader = getattr(self.dataset, "reader", None)
        name = reader.filename(index, absolute=True) if reader is not None else None
        if not name:
            return f"{self.source}, image {index}"
        return f"{self.source}:{name}" if self.source.is_tar else str(name)

    def inner_names(self) -> list[str]:
        """The names of the images within their source; none where that is a name or a stream."""
        if self.source.name or self.indices is None:
            return []
        return [str(self.dataset.reader.filename(int(index))) for index in self.indices]

    def at_most(self, limit: int | None, seed: int = 0) -> "Images":
        """A part of at most `limit` images, the classes as even as they allow; None: all of them.

        Raises:
            DataError: this is a stream.
            RecipeError: the limit is below 1.
        """
        if limit is None:
            return self
        if limit < 1:
            raise RecipeError(f"a limit of {limit} images leaves none; use 1 or more")
        places = self._places_in_class(seed)
        # first every class's first image, then every class's second one, ...; ties in any seeded order
        ties = np.random.default_rng([seed, 1]).permutation(len(places))
        return self._part(np.lexsort((ties, places))[:limit])

    def hold_out(self, share: float, seed: int = 0) -> tuple["Images", "Images"]:
        """Split in two: the rest, and `share` of each class.

        A class of two or more images has at least one on either side; a single image stays in the rest.

        Raises:
            DataError: this is a stream, or no class has two images.
            RecipeError: the share is not in (0, 1).
        """
        if not 0 < share < 1:
            raise RecipeError(f"--holdout {share:g} is not in (0, 1); 0.1 sets every tenth image aside")
        places = self._places_in_class(seed)
        _, inverse, counts = np.unique(self._labels(), return_inverse=True, return_counts=True)
        held = np.minimum(np.maximum(np.rint(counts * share), 1), counts - 1)
        out = places < held[inverse]
        if not out.any():
            raise DataError(f"{self.source}: no class has two images, so none can be held out")
        return self._part(np.flatnonzero(~out)), self._part(np.flatnonzero(out))

    def _labels(self) -> NDArray[np.int64]:
        if self.indices is None:
            raise DataError(
                f"{self.source}: a stream cannot be divided; leave out --holdout and --max-images, or use "
                "a folder, a tar or hfds/"
            )
        return labels_in(self.dataset, self.source)[self.indices]

    def _places_in_class(self, seed: int) -> NDArray[np.int64]:
        """Each image's place, from 0, in a shuffled queue of its class; shape (len(self),)."""
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
    on_bad_image: OnBadImage = "refuse",
    download: bool = False,
    max_images: int | None = None,
    seed: int = 0,
) -> Images:
    """Open one split of a data set.

    Args:
        data: a folder, a tar, or one of timm's data sets by name; see `source.locate`.
        split: `train`, `validation`, or what the data set calls it; `.` is the folder itself.
        data_root: the folder of a data set given by name.
        class_names: the model's, by index. The data's classes are mapped onto them by name; they may be
            fewer, and all must be known to the model.
        num_classes: the model's, where it has no names: the data must have as many.
        on_bad_image: `refuse` ends a pass with a `DataError` at the first image that cannot be read;
            `skip` goes on without it and puts its name into `Images.skipped`. A stream ends at what it
            cannot read either way, but for webdataset, which passes it over.
        download: let a data set given by name be downloaded.
        max_images: use at most so many, the classes as even as possible.
        seed: of the choice of `max_images`.

    Raises:
        DataError: the images are missing, empty or damaged, or their classes do not fit.
        RecipeError: an option has no meaning here.
    """
    source = locate(data, split, data_root, download)
    dataset = open_source(source)
    names = names_in(dataset)
    if not source.name:
        check_class_folders(source, dataset, names or ())
    classes = fit_classes(source, names, class_names, num_classes)
    indices = None if source.is_stream else np.arange(len(dataset))
    return Images(source, classes, dataset, indices, on_bad_image).at_most(max_images, seed)


def open_splits(
    data: str,
    *,
    train_split: str = "train",
    validation_split: str = "validation",
    holdout: float | None = None,
    data_root: str | None = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    on_bad_image: OnBadImage = "refuse",
    download: bool = False,
    max_images: int | None = None,
    max_validation_images: int | None = None,
    seed: int = 0,
) -> tuple[Images, Images]:
    """Open the training and the validation images, in one label space: that of the training images.

    Args:
        holdout: take this share of each class of the training split for validation, and do not look for
            a validation split.
        max_images: use at most so many training images.
        max_validation_images: and so many validation images.
        seed: of the choice of images.

    The other arguments are those of `open_images`.

    Raises:
        DataError: as `open_images`, or both splits are the same images.
        RecipeError: an option has no meaning here.
    """
    given: dict[str, Any] = {"data_root": data_root, "on_bad_image": on_bad_image, "download": download}
    if holdout is None and locate(data, train_split, data_root).overlaps(
        validation := locate(data, validation_split, data_root)
    ):
        raise DataError(
            f"{validation}: training and validation would use the same images; name the splits with "
            "--train-split and --val-split, or set training images aside with --holdout 0.1"
        )
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
    return train.at_most(max_images, seed), validation_images.at_most(max_validation_images, seed)
