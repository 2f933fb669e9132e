"""Locating the images of a split: the user's string becomes the arguments of timm's `create_dataset`.

timm uses the folder itself if a split is missing, and raises assertions and errors of other packages; here
every such case is a `DataError` that names the place and the remedy.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import ImageDataset, create_dataset

from nestify.data.labels import LabelTable
from nestify.data.listing import TEST_NAMES, TRAIN_NAMES, VALIDATION_NAMES
from nestify.data.local import LocalReader, names_in_folder, no_images
from nestify.data.pixels import open_image
from nestify.errors import DataError, RecipeError, foreign_code

EMBEDDED = Path(__file__).parent.parent / "recipes"

# packages that each kind of data set needs in addition to timm's dependencies, and the remedy on failure
_PACKAGES = {
    "hfds": ("datasets",),
    "hfids": ("datasets",),
    "tfds": ("tensorflow", "tensorflow_datasets"),
    "wds": ("webdataset",),
    "torch": (),
}
_REMEDIES = {
    "hfds": "check the name, the split (--train-split, --val-split) and the network",
    "hfids": "check the name, the split (--train-split, --val-split) and the network, or use hfds/",
    "tfds": "check the name and the split, and that --data-root is the folder that holds it",
    "wds": "a split is a name in the folder's info.json, or shards such as 'train-{0000..0009}.tar|50000'",
    "torch": "download it, and pass the folder that holds it as --data-root",
}
STREAMS = ("hfids", "tfds", "wds")

# torchvision's sets with a `train` flag: timm takes every other split, also misspelt, for the test images
_TRAIN_OR_TEST = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")


@dataclass(frozen=True)
class Split:
    """One split of a data set, as arguments of timm's `create_dataset`.

    Attributes:
        name: `hfds/...`, `wds/...`, `torch/...`; empty for a folder or a tar.
        root: folder or tar of this split; for named data sets the folder that holds them, if any.
        split: name of the split; a folder or tar is already that of the split.
    """

    name: str
    root: str | None
    split: str

    def __str__(self) -> str:
        if not self.name:
            return str(self.root)
        place = self.root if self.kind == "wds" else ""
        return f"{self.name}{place} (split {self.split!r})"

    @property
    def kind(self) -> str:
        """The kind, such as `hfds` or `torch`; empty for a folder or a tar."""
        return self.name.partition("/")[0]

    @property
    def is_tar(self) -> bool:
        return not self.name and Path(self.root or "").is_file()

    @property
    def is_stream(self) -> bool:
        """Whether its images can only be read sequentially."""
        return self.kind in STREAMS

    def overlaps(self, other: "Split") -> bool:
        """Return whether two splits share images: the same split, or one folder inside the other."""
        if self.name or other.name:
            return (self.name, self.root, _canonical(self)) == (other.name, other.root, _canonical(other))
        a, b = Path(self.root or "").resolve(), Path(other.root or "").resolve()
        return a.is_relative_to(b) or b.is_relative_to(a)


def _canonical(source: Split) -> str:
    if source.kind == "torch":
        if source.split in TRAIN_NAMES:
            return "train"
        if source.split in (*VALIDATION_NAMES, *TEST_NAMES):
            return "validation"
    return source.split


def locate_split(data: str, split: str, data_root: str | None = None) -> Split:
    """Locate one split of a data set; only folder names are read.

    Args:
        data: a folder that holds the splits as folders or tars (`train/`, `val.tar`; timm's synonyms
            are tried too), a folder of class folders, a `.tar` of class folders; or, by prefix, one of
            timm's data sets: `hfds/NAME`, `hfids/NAME`, `tfds/NAME`, `torch/NAME`, `wds/FOLDER`; or
            `embedded/digits`, which comes with nestify. `./torch/x` is a folder, `torch/x` is not.
        split: name of the split. A folder without splits, or a tar, is used completely.
        data_root: folder where timm finds a named data set.

    Raises:
        DataError: if there are no images, or not this split.
        RecipeError: if `data_root` is missing, or has no meaning for this data.
    """
    prefix, slash, rest = data.partition("/")
    kind = prefix.lower() if slash and rest else ""
    if kind in _PACKAGES:
        return _locate_named(kind, rest, split, data_root)
    if data_root is not None:
        raise RecipeError(f"--data-root {data_root} has no meaning for --data {data}; leave it out")
    path = Path(data)
    if kind == "embedded":
        path = EMBEDDED / rest
        names = sorted(archive.parent.name for archive in EMBEDDED.glob("*/train.tar"))
        if rest not in names:
            raise DataError(
                f"{data}: no such images; nestify comes with embedded/{', embedded/'.join(names)}"
            )
    try:
        return Split("", str(_local_split(path, split)), split)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _locate_named(kind: str, rest: str, split: str, data_root: str | None) -> Split:
    if kind == "wds":
        return Split("wds/", data_root or rest, split)
    if kind == "torch":
        if rest.lower() in ("image_folder", "folder"):
            raise RecipeError(f"--data torch/{rest}: give the folder itself as --data")
        if data_root is None:
            raise RecipeError(f"--data torch/{rest} needs the folder that holds it: --data-root FOLDER")
        known = (*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES)
        if rest.lower() in _TRAIN_OR_TEST and split not in known:
            raise DataError(f"torch/{rest}: no split {split!r}; it has train and test")
    return Split(f"{kind}/{rest}", data_root, split)


def _local_split(path: Path, split: str) -> Path:
    """Return the folder or tar of a split in `path`, or `path` itself if it has no splits."""
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; --data takes a folder of class folders, a .tar of them, "
            "or a data set's name after hfds/, hfids/, tfds/, wds/ or torch/"
        )
    if path.is_file():
        return path
    if not any(path.iterdir()):
        raise no_images(path)
    synonyms = next((names for names in (TRAIN_NAMES, VALIDATION_NAMES) if split in names), ())
    if found := _first_of(path, (split, *synonyms)):
        return found
    others = [name for name in (*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES) if _first_of(path, (name,))]
    if others or not synonyms:
        option = {TRAIN_NAMES: "--train-split", VALIDATION_NAMES: "--val-split"}.get(synonyms)
        raise DataError(
            f"{path}: no split {split!r}; it holds {names_in_folder(path)}; name the right one with "
            f"{option or '--train-split or --val-split'} (. is the folder itself); compress can also set "
            "training images aside (--holdout 0.1)"
        )
    return path


def _first_of(path: Path, names: tuple[str, ...]) -> Path | None:
    for name in names:
        for candidate in (path / name, path / f"{name}.tar"):
            if candidate.exists():
                return candidate
    return None


def open_split(
    source: Split,
    class_names: Sequence[str] | None = None,
    labelled: bool = True,
    table: LabelTable | None = None,
    **options: Any,
) -> Any:
    """Open timm's or torchvision's data set of a split; nothing is written into a folder of images.

    Args:
        source: the split, from `locate_split`.
        class_names: names that the classes of a folder or tar are known to have, if any.
        labelled: whether the folders in a folder or tar are classes.
        table: labels of the images in a folder or tar, in place of folders.
        options: further arguments of timm's `create_dataset`, for a data set that is given by name.

    Raises:
        DataError: if it cannot be opened; the message says why and what to do.
    """
    if not source.name:
        joined = source.split == "."
        reader = LocalReader(Path(source.root or ""), class_names, labelled, table, joined)
        return ImageDataset(source.root, reader=reader)
    if table is not None:
        raise RecipeError(f"--labels {table.path} is for a folder or a tar, not for {source}; leave it out")
    for package in _PACKAGES.get(source.kind, ()):
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:  # a folder of that name is not a package
            raise DataError(
                f"{source}: {source.kind}/ needs the package {package}; pip install "
                + package.replace("_", "-")
            )
    with (
        foreign_code(lambda reason: DataError(f"{source}: {reason}; {_REMEDIES[source.kind]}")),
        contextlib.redirect_stdout(sys.stderr),  # some readers print to standard output, which is for results
    ):
        dataset = create_dataset(
            source.name, root=source.root, split=source.split, search_split=False, **options
        )
    if hasattr(dataset, "loader"):  # torchvision's sets of files would open every format
        dataset.loader = open_image
    return dataset
