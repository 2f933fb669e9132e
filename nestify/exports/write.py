"""Writing a level as a plain model, which takes its place only when it has proven to be the level."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from torch import nn

from nestify.exports import timm
from nestify.exports.draft import Draft, Probe, probes, prove
from nestify.exports.onnx import onnx_draft
from nestify.exports.pt2 import pt2_draft
from nestify.exports.target import ExportFacts, ExportFormat, Target, check_options, choose_target
from nestify.file.reader import open_nested_file
from nestify.file.source import LocalFile
from nestify.files import atomic_file, atomic_folder


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        facts: of the level, as the export holds them.
        bytes: of the file, or of all files of a folder.
        max_difference: of a logit between the level and the export as it loads again, relative to the
            largest logit. `tolerance`: what was allowed.
        batch: images per call; None: any number.
        opset: of an ONNX model.
        load_line: one line of Python that loads it.
    """

    path: Path
    format: ExportFormat
    facts: ExportFacts
    bytes: int
    max_difference: float
    tolerance: float
    batch: int | None
    opset: int | None
    load_line: str


def export_level(
    plain: nn.Module,
    facts: ExportFacts,
    target: Target,
    *,
    batch: int | None = None,
    opset: int | None = None,
) -> Exported:
    """Write a level as a plain model, load it again, compare logits, and only then keep it.

    Args:
        plain: the level, in eval mode on the CPU: images (B, C, H, W) to logits (B, num_classes). For
            timm it has the names of timm's tensors, or of a part of them.
        facts: what the export says of itself.
        target: where to, and in which format; see `choose_target`.
        batch: images per call that onnx and pt2 are fixed to; None: any number.
        opset: version of ONNX's operators; None: one that runtimes read widely.

    Raises:
        RecipeError: if an option does not go with the format, or a package is missing.
        UnsupportedModelError: if the model cannot be written in this format.
        OutputError: if it cannot be written there, or what was written does not give the level's logits;
            an older file is then unchanged.
    """
    check_options(target.format, batch, opset)
    # Before anything is traced: a model that caches would keep what it saw then.
    expected = probes(plain, facts, batch)
    if target.format is ExportFormat.timm:
        plain, facts = timm.as_timm(plain, facts)
    if target.folder:
        return _export_folder(plain, facts, target, expected)
    draft = _draft(plain, facts, target.format, batch, opset)
    differences: list[float] = []

    def check(path: Path) -> None:
        differences.append(prove(draft.reopen, path, expected, draft.tolerance, str(target.path)))

    with atomic_file(target.path, check) as file:
        draft.write(file)
    return Exported(
        path=target.path,
        format=target.format,
        facts=facts,
        bytes=target.path.stat().st_size,
        max_difference=differences[0],
        tolerance=draft.tolerance,
        batch=batch,
        opset=draft.opset,
        load_line=draft.load_line(target.path),
    )


def _draft(
    plain: nn.Module, facts: ExportFacts, format: ExportFormat, batch: int | None, opset: int | None
) -> Draft:
    if format is ExportFormat.timm:
        return timm.timm_draft(plain, facts)
    if format is ExportFormat.onnx:
        return onnx_draft(plain, facts, batch, opset)
    return pt2_draft(plain, facts, batch)


def _export_folder(
    plain: nn.Module, facts: ExportFacts, target: Target, expected: Sequence[Probe]
) -> Exported:
    differences: list[float] = []

    def check(path: Path) -> None:
        differences.append(prove(timm.reopen_local_dir, path, expected, timm.TOLERANCE, str(target.path)))

    with atomic_folder(target.path, check) as folder:
        timm.write_local_dir(folder, plain, facts)
    return Exported(
        path=target.path,
        format=target.format,
        facts=facts,
        bytes=sum(file.stat().st_size for file in target.path.iterdir()),
        max_difference=differences[0],
        tolerance=timm.TOLERANCE,
        batch=None,
        opset=None,
        load_line=f"timm.create_model({f'local-dir:{target.path}'!r}, pretrained=True).eval()",
    )


def export(
    path: str | os.PathLike[str],
    level: int | str,
    format: str | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    batch: int | None = None,
    opset: int | None = None,
) -> "Exported":
    """Write one level as a plain model that needs no nestify, checked against the level's logits.

    Args:
        path: a nested file, or its address; nothing is read beyond the level's prefix.
        level: number or name.
        format: timm, onnx or pt2; None: by the suffix of `output`.
        output: a file, or for timm a new folder; None: beside the nested file.
        batch: images per call that onnx and pt2 are fixed to; None: any number.
        opset: version of ONNX's operators.

    Raises:
        RecipeError: if there is no such level or format, or an option does not fit the format.
        BadFileError: if the file is damaged, or does not make the model that it names.
        UnsupportedModelError: if the model has an operator that the format does not know.
        OutputError: if the export cannot be written, or is not the level when it is loaded again.
    """
    file = open_nested_file(path, truncated=True)
    file.check_whole(number := file.level_index(str(level)))
    facts = ExportFacts.of(file.manifest, number)
    beside = Path(file.name) if isinstance(file.source, LocalFile) else Path(PurePosixPath(file.name).name)
    target = choose_target(beside, facts, format, output)
    check_options(target.format, batch, opset)
    pass
    from nestify.file.loading import load_level

    return export_level(load_level(file, number), facts, target, batch=batch, opset=opset)
