"""The folder of the page: the nested file, a graph per level, the page itself and ONNX Runtime Web."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from nestify.demo.runtime import VERSION, license_files, runtime_files
from nestify.errors import DataError, RecipeError, UnsupportedModelError
from nestify.file.reader import NestedFile, open_nested_file
from nestify.file.slicing import slice_file
from nestify.files import atomic_folder, check_new_folder
from nestify.shown import Shown
from nestify.terminal import Progress

if TYPE_CHECKING:
    from nestify.demo.graph import LevelGraph

SCHEMA_VERSION = 1

ABOUT = "demo.json"
"""File by which the page finds the others."""

MODEL = "model.nested.safetensors"
"""Name of the nested file in the folder."""

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif")
"""Endings of pictures that browsers show."""


@dataclass(frozen=True, repr=False)
class Demo(Shown):
    """A page that was written.

    Attributes:
        source: path or address of the nested file.
        folder: the folder.
        levels: names of the levels, core first.
        level_bytes: bytes that the page fetches for each level: header, data and graph.
        embedded: bytes of the graphs, which the page fetches in addition to the nested file.
        bytes: bytes of all files of the folder.
    """

    source: str
    folder: Path
    levels: tuple[str, ...]
    level_bytes: tuple[int, ...]
    embedded: tuple[int, ...]
    bytes: int


def write_demo(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    pictures: Sequence[str | os.PathLike[str]] = (),
    runtime: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Demo:
    """Write a static page that runs the levels of a nested file in a browser.

    Every level is translated to ONNX, and its logits are compared with the level's before the folder is kept.

    Args:
        path: a nested file, or its address.
        output: a folder that does not exist or is empty.
        pictures: examples that the page offers.
        runtime: a folder with the files of ONNX Runtime Web; None to download them once into a cache.
        progress: called with the bytes of ONNX Runtime Web that were downloaded, and their total.

    Raises:
        RecipeError: if a package that ONNX needs is missing.
        DataError: if a picture is missing, or browsers do not show its kind.
        BadFileError: if the nested file is damaged, or cannot be read.
        SetupError: if ONNX Runtime Web is missing and cannot be downloaded.
        UnsupportedModelError: if a level cannot run in a browser.
        OutputError: if the folder cannot be written.
    """
    folder = Path(output)
    check_new_folder(folder)
    examples = [_check_picture(Path(picture)) for picture in pictures]
    file = open_nested_file(path)
    file.check_classifies("nestify demo")
    _check_channels(file)
    wasm = runtime_files(None if runtime is None else Path(runtime), progress)
    from nestify.demo.graph import level_graph

    with atomic_folder(folder, lambda _: None) as temporary:
        slice_file(path, file.n_levels, temporary / MODEL, progress=lambda done, total: None)
        copy = replace(open_nested_file(temporary / MODEL), name=file.name)
        graphs = [level_graph(copy, number) for number in range(1, file.n_levels + 1)]
        for number, graph in enumerate(graphs, start=1):
            (temporary / _graph_name(number)).write_bytes(graph.model)
        shown = [
            f"example{number}{picture.suffix.lower()}" for number, picture in enumerate(examples, start=1)
        ]
        for name, picture in zip(shown, examples, strict=True):
            (temporary / name).write_bytes(picture.read_bytes())
        for name, place in wasm.items():
            (temporary / name).write_bytes(place.read_bytes())
        for name, text in license_files().items():
            (temporary / name).write_bytes(text)
        for page in (files("nestify") / "demo" / "page").iterdir():
            (temporary / page.name).write_bytes(page.read_bytes())
        about = _about(graphs, shown)
        (temporary / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        size = sum(each.stat().st_size for each in temporary.iterdir())
    embedded = tuple(len(graph.model) for graph in graphs)
    needed = [file.prefix_bytes(number) + embedded[number - 1] for number in range(1, file.n_levels + 1)]
    names = tuple(level.name for level in file.manifest.levels)
    return Demo(file.name, folder, names, tuple(needed), embedded, size)


def _about(graphs: "Sequence[LevelGraph]", pictures: Sequence[str]) -> dict[str, object]:
    """Return what the page must know that is not in the nested file."""
    from nestify.demo.graph import WEIGHTS

    levels = [
        {
            "graph": _graph_name(number),
            "bytes": len(graph.model),
            "weights": WEIGHTS,
            "size": graph.size,
            "tensors": [asdict(tensor) for tensor in graph.tensors],
        }
        for number, graph in enumerate(graphs, start=1)
    ]
    about = {"schema_version": SCHEMA_VERSION, "file": MODEL, "pictures": list(pictures), "levels": levels}
    return {**about, "runtime": f"onnxruntime-web {VERSION}"}


def _graph_name(number: int) -> str:
    return f"level{number}.onnx"


def _check_picture(path: Path) -> Path:
    if path.suffix.lower() not in PICTURES:
        raise DataError(
            f"{path}: browsers may not show such a picture; give a file that ends with .png or .jpg"
        )
    if not path.is_file():
        raise DataError(f"{path}: there is no such picture; check the path")
    return path


def _check_channels(file: NestedFile) -> None:
    channels = file.manifest.model.preprocessing.input_size[0]
    if channels not in (1, 3):
        raise UnsupportedModelError(
            f"{file.name}: the model takes {channels} input channels; the page needs 1 (grey) or 3 (colours)"
        )


def check_demo_folder(folder: Path) -> Path:
    """Return a folder that `write_demo` wrote.

    Raises:
        RecipeError: if it is not one.
    """
    if not (folder / ABOUT).is_file() or not (folder / "index.html").is_file():
        raise RecipeError(
            f"{folder}: is not a folder that nestify demo wrote; give a nested file and -o folder/"
        )
    return folder
