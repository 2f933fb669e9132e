"""Images in a folder or a tar: the class of an image is the name of its first folder, or there is none."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO
from unicodedata import normalize

from nestify.data.labels import LabelTable
from nestify.data.listing import SPLITS, Listing, count_kinds, list_folder, list_tar, natural_key
from nestify.errors import DataError


class LocalReader:
    """The images of a folder or a tar in the form that timm's `ImageDataset` reads.

    Args:
        root: the folder or tar.
        class_names: names that classes are known to have, if any.
        labelled: whether folders are classes; if not, images may lie in any folder, or in none.
        table: labels of the images, in place of folders.
        joins_splits: whether the images of all splits inside are wanted together.

    Attributes:
        class_to_idx: index of each class, in natural order; empty without labels.
        targets: class index of each image, or the indices of its labels; 0 without labels.
        folders: the folders that were read, links resolved, with their paths; empty for a tar.
        notices: sentences about what was left out, and how classes were found.

    Raises:
        DataError: if there are no images, it is not clear what their classes are, or they are of several
            splits.
    """

    def __init__(
        self,
        root: Path,
        class_names: Sequence[str] | None = None,
        labelled: bool = True,
        table: LabelTable | None = None,
        joins_splits: bool = False,
    ) -> None:
        self._root = root
        self._is_tar = root.is_file()
        listing = list_tar(root) if self._is_tar else list_folder(root)
        if not listing.images:
            raise no_images(root, listing, labelled and table is None)
        if not joins_splits:
            _refuse_splits(root, listing, class_names or (), labelled and table is None)
        self._images = listing.images
        self.folders = listing.identities
        self.targets: list[int] | list[tuple[int, ...]]
        if labelled and table is not None:
            self.class_to_idx = {name: index for index, name in enumerate(table.names)}
            self.targets, notices = table.targets_of(root, [image.name for image in listing.images])
            listing.ignored = [(name, kind) for name, kind in listing.ignored if not table.is_at(root / name)]
            notices = [*([ignored] if (ignored := listing.notice()) else []), *notices]
        elif labelled:
            depth = _class_depth(root, listing, class_names or ())
            names = _class_names(root, listing, depth)
            self.class_to_idx = {name: index for index, name in enumerate(names)}
            index_of = {
                folder: self.class_to_idx[folder.split("/")[depth]] for folder in listing.image_folders
            }
            self.targets = [index_of[image.name.rpartition("/")[0]] for image in listing.images]
            notices = _notices(listing, depth, names)
        else:
            self.class_to_idx = {}
            self.targets = [0] * len(listing.images)
            notices = [ignored] if (ignored := listing.notice()) else []
        self.notices = tuple(f"{root}: {notice}" for notice in notices)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int | tuple[int, ...]]:
        image = self._images[index]
        file = open(image.path, "rb")  # noqa: SIM115, the caller closes it
        if image.size is None:
            return file, self.targets[index]
        with file:
            file.seek(image.start)
            return io.BytesIO(file.read(image.size)), self.targets[index]

    def filename(self, index: int, *, absolute: bool = False) -> str:
        """Return the name of an image below the root; with `absolute`, its path, if it is a file."""
        image = self._images[index]
        return image.path if absolute and not self._is_tar else image.name


_PACKED = {".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
"""Endings of archives that are not read."""


def no_images(root: Path, listing: Listing | None = None, labelled: bool = True) -> DataError:
    """Return the error for a folder or tar without images."""
    if listing is not None and listing.ignored:
        holds = count_kinds(kind for _, kind in listing.ignored)
    else:
        holds = names_in_folder(root) if root.is_dir() else "nothing"
    kinds = set() if listing is None else {kind for _, kind in listing.ignored}
    remedy = "`nestify guide images` lists the formats"
    if root.is_dir() and kinds & _PACKED:
        remedy = "unpack its archives, or repack them as train.tar and validation.tar"
    elif root.is_dir() and ".tar" in kinds:
        remedy = f"shards are read as --data wds/{root}, and an archive of class folders by its own path"
    return DataError(
        f"{root}: no images{' in class folders' if labelled else ''}; it holds {holds}; {remedy}"
    )


def names_in_folder(path: Path, limit: int = 8) -> str:
    """Return the first names in a folder, for messages."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"


def _class_depth(root: Path, listing: Listing, known: Sequence[str]) -> int:
    """Return the number of folders around the class folders: a single folder, or the folders of splits."""
    depth = 0
    if "" in listing.image_folders:
        raise DataError(
            f"{root}: images are outside class folders; put each into the folder of its class, such as "
            f"{root.stem}/cat/1.jpg, or compress and evaluate without classes (--unlabelled)"
        )
    shallowest = min(folder.count("/") for folder in listing.image_folders)
    while depth < shallowest:
        names = {name.split("/")[depth] for name in _folders_at(listing, depth)}
        if (len(names) > 1 and not names <= SPLITS) or names & set(known):
            break
        depth += 1
    return depth


def _refuse_splits(root: Path, listing: Listing, known: Sequence[str], has_classes: bool) -> None:
    """Refuse images of several splits, of which some are there to measure what was learned from the others.

    Args:
        root: the folder or tar.
        listing: its images.
        known: names that classes are known to have.
        has_classes: whether the innermost folders may be classes, whatever their names are.

    Raises:
        DataError: naming the splits.
    """
    innermost = min(folder.count("/") for folder in listing.image_folders)
    for depth in range(innermost + (not has_classes)):
        found = sorted(_folders_at(listing, depth))
        names = {name.rpartition("/")[2] for name in found}
        if len(names) > 1 and names <= SPLITS and not names & set(known):
            held = " and ".join(found)
            raise DataError(
                f"{root}: holds several splits, {held}; give a folder in which each is a folder or a .tar, "
                "such as train.tar and val.tar, or join them with --train-split . (a dot)"
            )
        if len(found) > 1:
            return


def _folders_at(listing: Listing, depth: int) -> set[str]:
    """Return the names, relative to the root, of the folders at a depth."""
    # a tar need not list its folders
    others = {name.rpartition("/")[0] for name, kind in listing.ignored if kind != "hidden" and "/" in name}
    parts = (name.split("/") for name in {*listing.image_folders, *others, *listing.folders})
    return {"/".join(part[: depth + 1]) for part in parts if len(part) > depth}


def _class_names(root: Path, listing: Listing, depth: int) -> list[str]:
    """Return the class folders in natural order; refuse those that cannot be classes."""
    folders = {"/".join(folder.split("/")[: depth + 1]) for folder in listing.image_folders}
    for name in sorted(_folders_at(listing, depth) - folders):
        inside = (kind for path, kind in listing.ignored if path.startswith(f"{name}/"))
        holds = count_kinds(inside) or "nothing"
        raise DataError(
            f"{root / name}: no images in this class folder; it holds {holds}; convert "
            "them, or remove the folder (`nestify guide images` lists the formats)"
        )
    names = {name.rpartition("/")[2] for name in folders}
    forms: dict[str, str] = {}
    for name in sorted(names):
        if not _is_text(name):
            raise DataError(f"{root}: the class folder {name!r} is not named in UTF-8; rename it")
        other = forms.setdefault(normalize("NFC", name), name)
        if other != name:
            raise DataError(
                f"{root}: two class folders are both named {name} (in different Unicode forms); rename or "
                "join them"
            )
    return sorted(names, key=natural_key)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _notices(listing: Listing, depth: int, names: Sequence[str]) -> list[str]:
    ignored = listing.notice()
    notices = [] if ignored is None else [ignored]
    deeper = min((folder for folder in listing.image_folders if folder.count("/") > depth), default=None)
    if depth or deeper:
        few = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        above = sorted({"/".join(folder.split("/")[:depth]) for folder in listing.image_folders})
        where = f"the folders in {' and '.join(above)}" if depth else "its first folders"
        inner = ""
        if deeper:
            folder = "/".join(deeper.split("/")[depth:])
            inner = f"; folders inside them, such as {folder}, are no classes"
            if _look_like_splits(listing, depth):
                inner += "; if the first ones are splits, name them with --train-split and --val-split"
        if len(above) > 1:
            inner += (
                f"; the images of {' and '.join(above)} are used together: to train on one and validate on "
                "another, give a folder in which each split is a folder or a .tar"
            )
        notices.append(f"the classes are {where}: {few}{inner}")
    return notices


def _look_like_splits(listing: Listing, depth: int) -> bool:
    """Return whether two or more class folders all hold folders of the same names, as splits do."""
    inside: dict[str, set[str]] = {}
    for folder in listing.image_folders:
        parts = folder.split("/")[depth:]
        inside.setdefault(parts[0], set()).update(parts[1:2])
    held = list(inside.values())
    return len(held) > 1 and len(held[0]) > 1 and all(names == held[0] for names in held)
