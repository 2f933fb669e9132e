"""The image files of a folder or a tar, and what is left out: hidden and other files, devices, broken links.

timm's readers keep only .png and .jpg, take hidden folders for classes, and follow links without end.
"""

import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from nestify.data.pixels import image_endings
from nestify.errors import DataError, foreign_code

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "val", "valid", "eval", "evaluation")
TEST_NAMES = ("test", "testing")
SPLITS = frozenset({*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES})
"""Names of the folders of splits."""

SYSTEM_FOLDERS = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
"""Folders that systems and storage devices create next to the user's, some of them with images."""

MAX_DEPTH = 16
"""Number of folders inside each other that are read."""

Identity = tuple[int, int]
"""Device and inode of a folder, which links do not change."""


class ImageFile(NamedTuple):
    """Where the bytes of an image are.

    Attributes:
        name: path below the root, with `/`.
        path: the file to open.
        start: position of the first byte.
        size: number of bytes; None up to the end of the file.
    """

    name: str
    path: str
    start: int = 0
    size: int | None = None


@dataclass
class Listing:
    """The images below a root, in natural order, and what was left out.

    Attributes:
        images: the images.
        folders: names of the folders below the root, hidden ones excepted.
        identities: the folders that were read, links resolved, with their paths; empty for a tar.
        ignored: name and kind of each file that was left out; a kind is an ending, or words.
        ignored_folders: names of the hidden folders, which were not read.
    """

    images: list[ImageFile] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    identities: dict[Identity, str] = field(default_factory=dict)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    ignored_folders: list[str] = field(default_factory=list)

    def add(self, image: ImageFile) -> None:
        """Add a regular file: to the images if its name ends like one, otherwise to the ignored files."""
        base = image.name.rpartition("/")[2]
        dot = base.rfind(".")
        ending = base[dot:].lower() if dot > 0 else ""
        if ending in image_endings():
            self.images.append(image)
        else:
            self.ignored.append((image.name, ending or "no ending"))

    def notice(self) -> str | None:
        """Return what was ignored, as `ignored 12 files (.txt 3, hidden 9)`; None if nothing was."""
        parts = []
        if self.ignored:
            kinds = count_kinds(kind for _, kind in self.ignored)
            parts.append(f"{len(self.ignored)} file{'s' * (len(self.ignored) > 1)} ({kinds})")
        if n := len(self.ignored_folders):
            names = sorted({name.rpartition("/")[2] for name in self.ignored_folders})
            more = ", ..." if len(names) > 3 else ""
            parts.append(f"{n} folder{'s' * (n > 1)} ({', '.join(names[:3])}{more})")
        return f"ignored {' and '.join(parts)}" if parts else None


def count_kinds(kinds: Iterable[str], limit: int = 5) -> str:
    """Return kinds with their numbers, the most frequent first, as `.txt 3, hidden 2`."""
    counts = Counter(kinds)
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{kind} {n}" for kind, n in common[:limit]]
    if rest := sum(n for _, n in common[limit:]):
        words.append(f"others {rest}")
    return ", ".join(words)


def natural_key(name: str) -> tuple[object, ...]:
    """Return a sort key by which `2` precedes `10`, upper case equals lower case, and no two names tie."""
    pieces = re.split(r"(\d+)", name.lower())
    # digits at odd places; longer numbers are larger, so that a name of 5,000 digits is no problem
    numbers = [(len(digits := piece.lstrip("0")), digits) for piece in pieces[1::2]]
    return (*[x for pair in zip(pieces[::2], [*numbers, (-1, "")], strict=True) for x in pair], name)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or one of the system's."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def list_folder(root: Path) -> Listing:
    """List the images below a folder. Links are followed, each folder once; only regular files are images.

    Raises:
        DataError: if a folder cannot be read, is reached twice, contains the root, or lies too deep.
    """
    found = Listing()
    try:
        above = {_identity(folder) for folder in root.resolve().parents}
        waiting = [(str(root), "")]
        while waiting:
            path, name = waiting.pop()
            _enter(found, path, name, above)
            with os.scandir(path) as entries:
                for entry in entries:
                    inner = f"{name}/{entry.name}" if name else entry.name
                    kind = _kind(entry)
                    if is_hidden(entry.name):
                        if kind == "folder":
                            found.ignored_folders.append(inner)
                        else:
                            found.ignored.append((inner, "hidden"))
                    elif kind == "folder":
                        waiting.append((entry.path, inner))
                    elif kind == "special":
                        found.ignored.append((inner, "not a regular file"))
                    else:
                        found.add(ImageFile(inner, entry.path))
    except OSError as error:
        raise DataError(f"{error.filename or root}: cannot be read: {error.strerror or error}") from error
    found.images = _in_natural_order(found.images)
    return found


def _in_natural_order(images: list[ImageFile]) -> list[ImageFile]:
    """Return images in the order of `natural_key`; folder by folder if that gives the same order."""
    folders: dict[str, list[ImageFile]] = {}
    for image in images:
        folders.setdefault(image.name.rpartition("/")[0], []).append(image)
    keys = {folder: natural_key(f"{folder}/")[:-1] for folder in folders}
    ordered = sorted(folders, key=keys.__getitem__)
    # Images of folders that differ in case or leading zeros alone are mixed, like those of inner folders.
    alike = any(keys[a] == keys[b] for a, b in pairwise(ordered))
    if alike or len({folder.count("/") for folder in folders}) > 1 or "" in folders:
        return sorted(images, key=lambda image: natural_key(image.name))
    for folder in ordered:
        start = len(folder) + 1
        folders[folder].sort(key=lambda image: natural_key(image.name[start:]))
    return [image for folder in ordered for image in folders[folder]]


def _identity(path: str | Path) -> Identity:
    info = os.stat(path)
    return info.st_dev, info.st_ino


def _kind(entry: "os.DirEntry[str]") -> str:
    """Return `folder`, `file` or `special` of what an entry is, or links to."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # such as a link to itself
        return "file"
    try:
        mode = os.stat(entry.path).st_mode
    except OSError:  # a broken link: as an image it cannot be read, which is reported with the others
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special"


def _enter(found: Listing, path: str, name: str, above: set[Identity]) -> None:
    """Record a folder that is about to be read, if it may be."""
    identity = _identity(path)
    if identity in above:
        raise DataError(f"{path}: a link to {os.path.realpath(path)}, which contains the images; remove it")
    if identity in found.identities:
        both = sorted((path, found.identities[identity]))
        raise DataError(f"{both[1]} and {both[0]} are the same folder; remove one of them")
    if name.count("/") >= MAX_DEPTH:
        raise DataError(f"{path}: more than {MAX_DEPTH} folders inside each other; remove it, or move it up")
    found.identities[identity] = path
    if name:
        found.folders.append(name)


def list_tar(path: Path) -> Listing:
    """List the images in a tar, and in tars inside it, whose names are then those of folders.

    Raises:
        DataError: if it is not a plain, complete tar.
    """
    found = Listing()
    with (
        foreign_code(
            lambda reason: DataError(
                f"{path}: not a plain tar archive ({reason}); images are read from a folder or an "
                "uncompressed .tar, so unpack or repack it"
            )
        ),
        tarfile.open(path, "r:") as tar,
    ):
        if path.suffix != ".tar":
            raise DataError(f"{path}: the name of an archive of images ends in .tar; rename it")
        _check_end_mark(path)
        _list_members(found, tar, str(path))
    found.images.sort(key=lambda image: natural_key(image.name))
    return found


def _check_end_mark(path: Path) -> None:
    """Refuse a truncated archive, which tarfile reads without an error."""
    with path.open("rb") as file:
        file.seek(-512, os.SEEK_END)
        if path.stat().st_size % 512 or any(file.read(512)):
            raise DataError(f"{path}: the archive is truncated (it has no end mark); copy it again")


def _list_members(found: Listing, tar: tarfile.TarFile, path: str, prefix: str = "", base: int = 0) -> None:
    """List the members of an open tar.

    Args:
        found: is filled.
        tar: the archive.
        path: the file that contains its bytes.
        prefix: precedes the members' names.
        base: position of the archive in the file.
    """
    files: dict[str, ImageFile] = {}
    links: dict[str, str] = {}
    for member in tar:
        name, kind = prefix + _normalized(member.name), _member_kind(member)
        if files.pop(name, None) or links.pop(name, None):  # the last member of a name counts, as for tar
            found.ignored.append((name, "replaced later"))
        if any(map(is_hidden, name.split("/"))):
            found.ignored += [(name, "hidden")] if kind != "folder" else []
        elif kind == "folder":
            found.folders += [name] if name != prefix else []
        elif kind == "file" and name.lower().endswith(".tar") and not prefix:
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as nested:
                _list_members(found, nested, path, name[: -len(".tar")] + "/", member.offset_data)
        elif kind == "file":
            files[name] = ImageFile(name, path, base + member.offset_data, member.size)
        elif kind == "link":
            links[name] = prefix + _link_target(member)
        else:
            found.ignored.append((name, "not a regular file"))
    _check_whole(tar, path)
    for image in files.values():
        found.add(image)
    _add_links(found, links, files)


def _member_kind(member: tarfile.TarInfo) -> str:
    """Return `folder`, `file`, `link` or `special`."""
    if member.isdir():
        return "folder"
    if member.issym() or member.islnk():
        return "link"
    return "file" if member.isreg() and not member.issparse() else "special"


def _link_target(member: tarfile.TarInfo) -> str:
    """Return the name of the member that a link stands for; a hard link counts from the archive's root."""
    if member.islnk():
        return _normalized(member.linkname)
    return _normalized(os.path.join("/", os.path.dirname(member.name), member.linkname))


def _add_links(found: Listing, links: dict[str, str], files: dict[str, ImageFile]) -> None:
    """Add the links whose target is in the archive, also by other links, as files of their own name."""
    for name in links:
        target = name
        for _ in range(MAX_DEPTH):  # also ends for links in a circle
            target = links.get(target, target)
        if target in files:
            found.add(files[target]._replace(name=name))
        else:
            found.ignored.append((name, "link"))


def _normalized(name: str) -> str:
    return os.path.normpath(f"/{name}").lstrip("/")


def _check_whole(tar: tarfile.TarFile, path: str) -> None:
    """Refuse a damaged header or an appended archive, at which tarfile stops without an error."""
    file = tar.fileobj
    assert file is not None
    file.seek(tar.offset)
    while chunk := file.read(2**20):
        if chunk.strip(b"\0"):
            raise DataError(
                f"{path}: its members cannot be read after byte {tar.offset} (a damaged header, or another "
                "archive appended); copy it again, or repack it"
            )
