"""The hash of everything that a job's result depends on: options, file contents, and nestify's version."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nestify.recipe.flat_options import FREE, flat_options
from nestify.recipe.paths import INPUT_FILES, LOCAL_MODEL, MODELS
from nestify.recipe.recipe import Recipe
from nestify.recipe.sources import is_named_data
from nestify.version import __version__

SMALL = 64 * 2**20
"""Archives of images below this number of bytes are identified by their bytes instead of their size."""


class Contents:
    """Hashes of files and folders, each computed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, bool], str] = {}

    def of_bytes(self, path: str) -> str:
        """Return the hash of a file's bytes, or of the bytes of a folder's files."""
        return self._of(path, by_bytes=True)

    def of_images(self, path: str) -> str:
        """Return the hash of a folder's names and sizes; small archives and top-level files count by bytes.

        Modification times do not count, because a new checkout has new ones.
        """
        return self._of(path, by_bytes=False)

    def _of(self, path: str, *, by_bytes: bool) -> str:
        key = os.path.abspath(path), by_bytes
        if key not in self._known:
            self._known[key] = _hash(_digest_lines(Path(path), by_bytes))
        return self._known[key]


def job_identity(recipe: Recipe, contents: Contents) -> str:
    """Return the SHA-256 of everything that a recipe's result depends on; files count by content.

    A missing file counts as missing; the job itself reports it.
    """
    options = {
        key: _option_value(key, value, contents) for key, value in flat_options(recipe) if key not in FREE
    }
    options |= {
        key: value and contents.of_bytes(value) for key, value in flat_options(recipe) if key in INPUT_FILES
    }
    if is_named_data(recipe.data.path) and not recipe.data.path.startswith("wds/"):
        options["data.root"] = None  # a folder for downloads, which can fill while the job runs
    return _hash([json.dumps({"nestify": __version__, "options": options}, sort_keys=True)])


def _option_value(key: str, value: Any, contents: Contents) -> Any:
    """Return an option's value, or the hash of the file or folder that it names."""
    if not isinstance(value, str):
        return value
    if key in MODELS and value.startswith(LOCAL_MODEL):
        return contents.of_bytes(value.removeprefix(LOCAL_MODEL))
    if key == "data.root":
        return contents.of_images(value)
    if key == "data.path" and os.path.isdir(shards := value.removeprefix("wds/")) and shards != value:
        return contents.of_images(shards)
    if key == "data.path" and not is_named_data(value):
        return contents.of_images(value)
    return Path(value).name if key == "finetune.save" else value


def _digest_lines(path: Path, by_bytes: bool) -> Iterator[str]:
    if path.is_file():
        yield _file(path, by_bytes or path.stat().st_size < SMALL)
    elif path.is_dir():
        for name, file in _files(path):
            uppermost = "/" not in name
            small = uppermost and file.stat().st_size < SMALL
            yield f"{name} {_file(file, by_bytes or small)}"
    else:
        yield "missing"


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield all files in a folder by relative name, in a fixed order; links are followed once, never up."""
    seen = set(map(str, folder.resolve().parents))
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(files):
            file = Path(root, name)
            if file.is_file():
                yield file.relative_to(folder).as_posix(), file


def _file(path: Path, by_bytes: bool) -> str:
    try:
        if not by_bytes:
            return f"of {path.stat().st_size} bytes"
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _hash(texts: Iterator[str] | list[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{text}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
