"""Write a level as a plain model, which is kept only after its logits have been compared with the level's."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn

from nestify.errors import OutputError, UnsupportedModelError, foreign_code
from nestify.exports import timm
from nestify.exports.coreml import coreml_draft
from nestify.exports.draft import Draft, FolderDraft, Probe, probes, prove, prove_weights, quiet
from nestify.exports.executorch import executorch_draft
from nestify.exports.onnx import onnx_draft
from nestify.exports.openvino import openvino_draft
from nestify.exports.options import check_options
from nestify.exports.picture_input import PictureInput
from nestify.exports.preprocessing import TOLERANCE, picture_probes
from nestify.exports.pt2 import pt2_draft
from nestify.exports.target import ExportFacts, ExportFormat, Target
from nestify.files import atomic_file, atomic_folder
from nestify.recipe.metric import Metric
from nestify.shown import Shown


@dataclass(frozen=True)
class Int8:
    """How good an int8 model is next to its level, on the same images.

    Attributes:
        metric: what both are judged by.
        float32_score: score of the level in percent; 100 if the int8 model is compared with it.
        score: score of the int8 model in percent.
        agreement: share of the images for which both predict the same class, in percent; None if they
            predict no single class.
        images: number of these images.
        calibration_images: number of images that the ranges of activations come from.
        float_layers: names of the layers that stayed in float32.
        reduce_range: whether the weights have 7 bits.
        saturates: whether sums saturated in dense layers on the processor that evaluated the model, as they
            do on x86 without VNNI.
    """

    metric: Metric
    float32_score: float
    score: float
    agreement: float | None
    images: int
    calibration_images: int
    float_layers: Sequence[str]
    reduce_range: bool
    saturates: bool

    @property
    def drop(self) -> float:
        """What int8 loses, in points of the score."""
        return self.float32_score - self.score

    def document(self) -> dict[str, object]:
        """Return it as JSON values, with the metric's name in the keys."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        metric, before, score = (values.pop(name) for name in ("metric", "float32_score", "score"))
        return {f"float32_{metric.key}": before, **values, metric.key: score, "drop": self.drop}


@dataclass(frozen=True, repr=False)
class Exported(Shown):
    """What was written.

    Attributes:
        path: the file or folder.
        format: its format.
        facts: facts of the level, as stored in the export.
        bytes: size of the file, or of all files of the folder.
        max_difference: largest difference of a logit between the level and the export when loaded again,
            relative to the largest logit; if nothing on this machine runs it, of a weight.
        tolerance: largest difference that was allowed.
        batch: number of images per call; None for any number.
        opset: version of ONNX's operators; None for other formats.
        load_line: one line of Python that loads it.
        packed_layers: number of layers that are packed for the sparse engine; None if it does not need it.
        dtype: type that weights are stored as.
        checked_by: what ran it to compare its logits, with the version; None if only its stored weights were
            compared.
        int8: accuracy of an int8 model; None for other types.
        with_preprocessing: whether it takes pictures, and preprocesses them.
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
    packed_layers: int | None = None
    dtype: str = "float32"
    checked_by: str | None = None
    int8: Int8 | None = None
    with_preprocessing: bool = False


def export_level(
    plain: nn.Module,
    facts: ExportFacts,
    target: Target,
    *,
    batch: int | None = None,
    opset: int | None = None,
    dtype: str | None = None,
    pictures: bool = False,
) -> Exported:
    """Write a level as a plain model, load it again, compare logits, and only then keep it.

    Args:
        plain: the level, in eval mode on the CPU: images (B, C, H, W) to logits, or what it returns. For
            timm its tensors have timm's names, or some of them.
        facts: what the export states about itself.
        target: path and format; see `choose_target`.
        batch: number of images per call that the export is fixed to; None for any number, or 1 for coreml.
        opset: version of ONNX's operators; None for one that most runtimes read.
        dtype: type that weights are stored as; None for the format's default.
        pictures: whether the export takes pictures and preprocesses them; not for timm and coreml.

    Raises:
        RecipeError: if an option does not apply to the format, or a package is missing.
        UnsupportedModelError: if the model cannot be written in this format.
        OutputError: if it cannot be written there, or its logits differ from the level's; an older file is
            then unchanged.
    """
    check_options(target.format, batch, opset, dtype, pictures)
    # Core ML's fast paths want a fixed shape, and ExecuTorch reserves memory for the largest pictures.
    if batch is None and (
        target.format is ExportFormat.coreml or (pictures and target.format is ExportFormat.executorch)
    ):
        batch = 1
    # Before tracing, because a model that caches tensors would keep those of the trace.
    expected = picture_probes(plain, facts, batch) if pictures else probes(plain, facts, batch)
    if target.format is ExportFormat.timm:
        plain, facts = timm.as_timm(plain, facts)
    draft = _draft(plain, facts, target, batch, opset, dtype, pictures)
    if pictures:
        draft = replace(draft, tolerance=max(draft.tolerance, TOLERANCE))
    return keep(draft, expected, facts, target, batch)


def keep(
    draft: Draft | FolderDraft,
    expected: Sequence[Probe],
    facts: ExportFacts,
    target: Target,
    batch: int | None,
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
        name = str(target.path)
        if draft.reopen is not None:
            differences.append(prove(draft.reopen, path, expected, draft.tolerance, name))
        elif isinstance(draft, FolderDraft) and draft.compare is not None:
            differences.append(prove_weights(draft.compare, path, draft.tolerance, name))

    def refusal(reason: str) -> OutputError:
        return OutputError(
            f"{target.path}: cannot be written ({reason}); make room, or choose another folder"
        )

    if isinstance(draft, FolderDraft):
        with atomic_folder(target.path, check) as folder, foreign_code(refusal), quiet():
            draft.fill(folder)
        size = sum(file.stat().st_size for file in target.path.rglob("*") if file.is_file())
    else:
        with atomic_file(target.path, check) as file:
            draft.write(file)
        size = target.path.stat().st_size
    return Exported(
        path=target.path,
        format=target.format,
        facts=facts,
        bytes=size,
        max_difference=differences[0],
        tolerance=draft.tolerance,
        batch=batch,
        opset=draft.opset if isinstance(draft, Draft) else None,
        load_line=draft.load_line(target.path),
        dtype=draft.dtype,
        with_preprocessing=expected[0].images.dtype == torch.uint8,
        checked_by=None if draft.reopen is None else draft.runtime,
    )


def _draft(
    plain: nn.Module,
    facts: ExportFacts,
    target: Target,
    batch: int | None,
    opset: int | None,
    dtype: str | None,
    pictures: bool,
) -> Draft | FolderDraft:
    dtype = dtype or target.format.dtypes[0]
    if pictures and target.format is not ExportFormat.onnx:  # which has a resize of its own
        plain = PictureInput(plain, facts).eval()
    if facts.output == "features" and target.format in (ExportFormat.coreml, ExportFormat.executorch):
        raise UnsupportedModelError(
            f"{facts.title} returns a list of feature maps, which --format {target.format} does not support; "
            "export it as onnx, openvino or pt2"
        )
    if facts.output == "features" and target.folder and target.format is ExportFormat.timm:
        raise UnsupportedModelError(
            f"{facts.title} returns a list of feature maps, and timm loads folders into classifiers only; "
            "write a file that ends with .safetensors"
        )
    match target.format:
        case ExportFormat.timm:
            return timm.local_dir_draft(plain, facts) if target.folder else timm.timm_draft(plain, facts)
        case ExportFormat.onnx:
            return onnx_draft(plain, facts, batch, opset, pictures)
        case ExportFormat.pt2:
            return pt2_draft(plain, facts, batch)
        case ExportFormat.openvino:
            return openvino_draft(plain, facts, batch, dtype)
        case ExportFormat.coreml:
            return coreml_draft(plain, facts, batch, dtype)
        case ExportFormat.executorch:
            return executorch_draft(plain, facts, batch)
