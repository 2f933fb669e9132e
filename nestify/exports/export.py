"""`nestify.export`: one level as a plain model; options are checked before torch is imported."""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from nestify.exports.options import check_options
from nestify.exports.target import ExportFacts, choose_target
from nestify.file.reader import NestedFile, open_nested_file
from nestify.file.source import LocalFile

if TYPE_CHECKING:
    from nestify.exports.write import Exported


@dataclass(frozen=True)
class OpenedLevel:
    """A level of a nested file that is about to be exported.

    Attributes:
        file: the nested file, whose bytes up to the level are there.
        number: number of the level, 1 for the core level.
        facts: what its exports state about themselves.
        source: path of the nested file, or the file's name if it is at an address.
    """

    file: NestedFile
    number: int
    facts: ExportFacts
    source: Path


def open_level(path: str | os.PathLike[str], level: int | str) -> OpenedLevel:
    """Open one level of a nested file.

    Args:
        path: the file, or its address; nothing is read after the level's prefix.
        level: number or name of the level.

    Raises:
        RecipeError: if there is no such level.
        BadFileError: if the file is damaged, or ends within the level.
    """
    file = open_nested_file(path, truncated=True)
    file.check_whole(number := file.level_index(str(level)))
    source = Path(file.name) if isinstance(file.source, LocalFile) else Path(PurePosixPath(file.name).name)
    return OpenedLevel(file, number, ExportFacts.for_level(file.manifest, number), source)


def export(
    path: str | os.PathLike[str],
    level: int | str,
    format: str | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    batch: int | None = None,
    opset: int | None = None,
    dtype: str | None = None,
    with_preprocessing: bool = False,
) -> "Exported":
    """Write one level as a plain model that works without nestify, checked against the level's logits.

    Args:
        path: a nested file, or its address; nothing is read after the level's prefix.
        level: number or name of the level.
        format: timm, onnx, pt2, openvino, coreml or executorch; by default the one that the suffix of
            `output` names.
        output: a file, or a new folder for timm, openvino and coreml; by default next to the nested file.
        batch: number of images per call that the export is fixed to; by default any number, for coreml 1.
        opset: version of ONNX's operators.
        dtype: type that weights are stored as: for openvino float32 or float16, for coreml float16, float32
            or int8; by default the first of these.
        with_preprocessing: whether the export takes decoded upright pictures, uint8 (B, height, width, C)
            of any size, and resizes, crops and normalises them; for onnx, pt2, openvino and executorch.

    Raises:
        RecipeError: if there is no such level or format, or an option does not fit the format.
        BadFileError: if the file is damaged, or does not make the model that it names.
        UnsupportedModelError: if the model has an operator that the format does not know.
        OutputError: if the export cannot be written, or its logits differ when it is loaded again.
    """
    opened = open_level(path, level)
    target = choose_target(opened.source, opened.facts, format, output)
    check_options(target.format, batch, opset, dtype, with_preprocessing)
    from nestify.exports.write import export_level
    from nestify.file.loading import load_level

    return export_level(
        load_level(opened.file, opened.number),
        opened.facts,
        target,
        batch=batch,
        opset=opset,
        dtype=dtype,
        pictures=with_preprocessing,
    )
