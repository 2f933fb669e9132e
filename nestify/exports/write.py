"""Write a level as a plain model, which is kept only after its logits have been compared with the level's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nestify.exports import timm
from nestify.exports.draft import Draft, Probe, probes, prove
from nestify.exports.onnx import onnx_draft
from nestify.exports.pt2 import pt2_draft
from nestify.exports.target import ExportFacts, ExportFormat, Target, check_options
from nestify.files import atomic_file, atomic_folder
from nestify.shown import Shown


@dataclass(frozen=True)
class Int8Accuracy:
    """How an int8 model compares with its level in float32, on the same images.

    Attributes:
        images: number of images.
        float32_top1: accuracy of the level, in percent.
        top1: accuracy of the int8 model, in percent.
        agreement: percent of the images for which both predict the same class.
    """

    images: int
    float32_top1: float
    top1: float
    agreement: float

    @property
    def drop(self) -> float:
        """What int8 loses, in points."""
        return self.float32_top1 - self.top1


@dataclass(frozen=True, repr=False)
class Exported(Shown):
    """What was written.

    Attributes:
        path: the file or folder.
        format: its format.
        facts: facts of the level, as stored in the export.
        bytes: size of the file, or of all files of the folder.
        max_difference: largest difference of a logit between the level and the export when loaded again,
            relative to the largest logit.
        tolerance: largest difference that was allowed; None for int8, whose accuracy is compared.
        batch: number of images per call; None for any number.
        opset: version of ONNX's operators; None for other formats.
        load_line: one line of Python that loads it.
        packed_layers: number of layers that are packed for the sparse engine; None if it does not need it.
        int8: how accurate it is, if it is in int8.
    """

    path: Path
    format: ExportFormat
    facts: ExportFacts
    bytes: int
    max_difference: float
    tolerance: float | None
    batch: int | None
    opset: int | None
    load_line: str
    packed_layers: int | None = None
    int8: Int8Accuracy | None = None


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
            timm its tensors have timm's names, or some of them.
        facts: what the export states about itself.
        target: path and format; see `choose_target`.
        batch: number of images per call that onnx and pt2 are fixed to; None for any number.
        opset: version of ONNX's operators; None for one that most runtimes read.

    Raises:
        RecipeError: if an option does not apply to the format, or a package is missing.
        UnsupportedModelError: if the model cannot be written in this format.
        OutputError: if it cannot be written there, or its logits differ from the level's; an older file is
            then unchanged.
    """
    check_options(target.format, batch, opset)
    # Before tracing, because a model that caches tensors would keep those of the trace.
    expected = probes(plain, facts, batch)
    if target.format is ExportFormat.timm:
        plain, facts = timm.as_timm(plain, facts)
    if target.folder:
        return _export_folder(plain, facts, target, expected)
    return keep(_draft(plain, facts, target.format, batch, opset), expected, facts, target, batch)


def keep(
    draft: Draft, expected: Sequence[Probe], facts: ExportFacts, target: Target, batch: int | None
) -> Exported:
    """Write a draft to its path if, loaded again, it gives the level's logits.

    Args:
        draft: the level in one format.
        expected: images, and the level's logits for them.
        facts: what the export states about itself.
        target: path and format.
        batch: number of images per call; None for any number.

    Raises:
        OutputError: if it cannot be written there, or its logits differ from the level's; an older file is
            then unchanged.
    """
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
