"""The folder of a repository: a nested file, its model card, and `config.json`. Does not import torch."""

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from nestify.errors import RecipeError
from nestify.file.reader import NestedFile, open_nested_file
from nestify.file.slicing import slice_file
from nestify.file.source import LocalFile, pieces
from nestify.file.summary import Report, read_report
from nestify.files import atomic_folder, check_new_folder
from nestify.hub.card import card_text
from nestify.hub.card_options import CardOptions
from nestify.shown import Shown
from nestify.terminal import Progress

SCHEMA_VERSION = 1

OPTIONAL_SCORES = ("map", "agreement", "cosine")
"""Values of a level that are left out if they were not measured."""

CARD = "README.md"
CONFIG = "config.json"


@dataclass(frozen=True, repr=False)
class Card(Shown):
    """A folder that was written.

    Attributes:
        source: path or address of the nested file.
        folder: the folder.
        file: name of the nested file in it.
        bytes: size of the nested file.
        sha256: SHA-256 of the nested file, in hexadecimal.
        levels: names of its levels, core first.
        options: what the user said about it.
    """

    source: str
    folder: Path
    file: str
    bytes: int
    sha256: str
    levels: tuple[str, ...]
    options: CardOptions


def write_card(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    repo: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    progress: Progress | None = None,
) -> Card:
    """Write the folder of a repository on the hub: the nested file, a model card and `config.json`.

    The bytes of every level are checked by their hashes. Accuracies by class and latencies that are stored
    next to the file are in the card.

    Args:
        path: a nested file, or its address.
        output: a folder that does not exist or is empty.
        repo: the repository, `owner/repo`, for the commands in the card.
        license: the hub's identifier of the licence.
        base_model: the model on the hub that the file was made from.
        dataset: the data set on the hub that it was trained and validated on.
        progress: called with the bytes that were copied, and their total; None shows a bar at a terminal and
            in a notebook.

    Raises:
        RecipeError: if one of the names is not valid.
        BadFileError: if the file is damaged, or cannot be read.
        OutputError: if the folder cannot be written.
    """
    options = CardOptions(repo, license, base_model, dataset)
    file = open_nested_file(path)
    repo_file_name(file)
    check_new_folder(folder := Path(output))
    with atomic_folder(folder, lambda _: None) as temporary:
        card = fill_folder(temporary, path, options, progress)
    return replace(card, folder=folder)


def fill_folder(
    folder: Path, path: str | os.PathLike[str], options: CardOptions, progress: Progress | None
) -> Card:
    """Write the files of a repository into an empty folder; see `write_card` for arguments and errors."""
    file = open_nested_file(path)
    name = repo_file_name(file)
    slice_file(path, file.n_levels, folder / name, progress=progress)
    copy = open_nested_file(folder / name)
    sha256 = file_sha256(copy)
    report = read_report(path)
    text = card_text(file, report, name, sha256, options)
    (folder / CARD).write_text(text, encoding="utf-8")
    config = config_document(file, report, name, sha256)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    levels = tuple(level.name for level in report.levels)
    return Card(file.name, folder, name, copy.source.size, sha256, levels, options)


def repo_file_name(file: NestedFile) -> str:
    """Return the name of a nested file in a repository, which is part of an address.

    Raises:
        RecipeError: if an address cannot have it as it is.
    """
    local = isinstance(file.source, LocalFile)
    name = Path(file.name).name if local else PurePosixPath(file.name).name
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,127}", name, re.ASCII) or name in (CARD, CONFIG):
        raise RecipeError(
            f"{file.name}: the name {name!r} does not fit into an address; rename the file, with letters, "
            "digits, '.', '-' and '_' only, such as model.nested.safetensors"
        )
    return name


def file_sha256(file: NestedFile) -> str:
    """Return the SHA-256 of a whole file, in hexadecimal."""
    digest = hashlib.sha256()
    for piece in pieces(file.source, 0, file.source.size):
        digest.update(piece)
    return digest.hexdigest()


def config_document(file: NestedFile, report: Report, name: str, sha256: str) -> dict[str, Any]:
    """Return `config.json`: what a program must know to choose, download and run a level.

    Args:
        file: the nested file.
        report: its report.
        name: name of the file in the repository.
        sha256: SHA-256 of the whole file, in hexadecimal.
    """
    model = file.manifest.model
    levels = [
        {
            "level": level.level,
            "name": level.name,
            "sparsity": level.sparsity,
            "width": level.width,
            "depth": level.depth,
            "prefix_bytes": level.prefix_bytes,
            "sha256": entry.sha256,
            "parameters": level.parameters,
            "nonzero_parameters": level.nonzero_parameters,
            "dense_macs": level.dense_macs,
            "effective_macs": level.effective_macs,
            "top1": level.top1,
            "top5": level.top5,
            "images": level.images,
            "temperature": level.temperature,
            "num_classes": level.classes,
            "class_set": level.class_set or None,
            **{name: value for name in OPTIONAL_SCORES if (value := getattr(level, name)) is not None},
        }
        for level, entry in zip(report.levels, file.manifest.levels, strict=True)
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "library_name": "nestify",
        "file": name,
        "bytes": report.file_bytes,
        "sha256": sha256,
        "architecture": model.architecture,
        "model_kwargs": model.kwargs,
        "num_classes": model.num_classes,
        "class_names": model.class_names,
        "class_sets": [classes.model_dump(mode="json") for classes in file.manifest.hierarchy],
        "preprocessing": model.preprocessing.model_dump(mode="json"),
        "levels": levels,
        "versions": dict(report.versions),
        "source_sha256": report.source_sha256,
    }
