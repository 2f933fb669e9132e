"""A level in int8: quantised on training images, and kept only if its accuracy is near that of the level."""

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nestify.data.hierarchy import coarse_target, stored_class_levels
from nestify.data.loaders import Loader, eval_loader
from nestify.data.validation import open_evaluation_images, recorded_split
from nestify.errors import DataError, GateFailed, RecipeError
from nestify.evaluation.agreement import cosine_similarity
from nestify.evaluation.comparison import choose_metric
from nestify.evaluation.on_engine import CALIBRATION_IMAGES, Calibration
from nestify.evaluation.precision import average_precision
from nestify.evaluation.quantiser import Kind, Quantised, Quantiser
from nestify.evaluation.runtimes import sums_saturate
from nestify.exports.draft import Runner, probes
from nestify.exports.export import open_level
from nestify.exports.options import check_int8, check_options
from nestify.exports.preprocessing import picture_probes
from nestify.exports.target import ExportFormat, choose_target
from nestify.exports.write import Exported, Int8, keep
from nestify.file.loading import load_level
from nestify.file.reader import NestedFile
from nestify.recipe.metric import COSINE, MAP, Metric, metric_of
from nestify.terminal import Progress, shown_progress

MAX_DROP = 1.0
"""Default limit for the loss, in points."""


def export_int8(
    path: str | os.PathLike[str],
    level: int | str,
    data: str | os.PathLike[str],
    format: str | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    calibrate_images: int = CALIBRATION_IMAGES,
    max_drop: float = MAX_DROP,
    labels: str | os.PathLike[str] | None = None,
    train_split: str | None = None,
    split: str | None = None,
    data_root: str | None = None,
    max_images: int | None = None,
    batch: int | None = None,
    opset: int | None = None,
    with_preprocessing: bool = False,
    sparse: bool = False,
    reduce_range: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write one level as an int8 model for ONNX Runtime or OpenVINO, if its accuracy is near the level's.

    Weights are signed, with a scale for each output channel. Activations are unsigned; their ranges come from
    training images. The model is evaluated before it is kept. If it loses more than `max_drop` points, the
    layers that cost most stay in float32: first one, then 2, 4, ... up to half of them.

    Args:
        path: a nested file, or its address.
        level: number or name of the level.
        data: images, as for `compress`: training images to calibrate on, and validation images. If there are
            no splits, the same images serve for both.
        format: onnx or openvino; by default the one that the suffix of `output` names, or onnx.
        output: an .onnx file, or a new folder for openvino; by default next to the nested file.
        calibrate_images: number of training images to calibrate on, balanced over the classes.
        max_drop: largest loss that is allowed, in points: of top-1 accuracy, or of the mean average
            precision; a level that learned without labels is compared with the int8 model, and needs no
            labels.
        labels: CSV table of the labels of each image, of levels that predict several.
        train_split: name of the split to calibrate on; None for `train`.
        split: name of the split to evaluate on; None for `validation`, or else the one that the file was
            validated on.
        data_root: folder of a named data set.
        max_images: maximum number of images to evaluate on, balanced over the classes.
        batch: number of images per call; by default any number.
        opset: version of ONNX's operators.
        with_preprocessing: as for `nestify.export`.
        sparse: whether sparse layers are packed for the sparse engine, for onnx.
        reduce_range: whether weights have 7 bits, with which sums of dense layers saturate on no processor;
            with 8 they do on x86 without VNNI.
        progress: called after each batch with the images that were evaluated, and their total; None shows a
            bar at a terminal and in a notebook.

    Raises:
        NestifyError: as `nestify.export` and `nestify.evaluate`.
        GateFailed: if the loss of accuracy is above the limit also with half of the layers in float32.
    """
    _check_numbers(calibrate_images, max_drop)
    opened = open_level(path, level)
    file, number, facts = opened.file, opened.number, opened.facts
    if file.manifest.model.output == "features":
        file.check_classifies("--int8")
    labels = None if labels is None else os.fspath(labels)
    unlabelled = metric_of(file.manifest.levels[-1].metrics).is_comparison
    unlabelled = unlabelled or file.manifest.model.output == "embedding"
    metric = choose_metric(file, [number], "--int8", labels=labels, unlabelled=unlabelled, options={})
    target = choose_target(opened.source, facts, format or (None if output else "onnx"), output, mark="int8")
    check_int8(target.format)
    if sparse and target.format is not ExportFormat.onnx:
        raise RecipeError(f"--sparse applies to --format onnx, not to {target.format}; leave it out")
    check_options(target.format, batch, opset, None, with_preprocessing)
    images = _Images.open(
        file,
        number,
        metric,
        calibrate_images,
        max_images,
        train_split=train_split,
        split=split,
        data=os.fspath(data),
        labels=labels,
        data_root=data_root,
    )
    plain = load_level(file, number)
    make_probes = picture_probes if with_preprocessing else probes
    expected = make_probes(plain, facts, batch)
    with tempfile.TemporaryDirectory(prefix="nestify-int8-") as folder:
        kind = Kind(target.format, batch, opset, sparse, with_preprocessing, reduce_range)
        quantiser = Quantiser(plain, facts, images.calibration, Path(folder), kind)
        with shown_progress(progress, "images") as advance:
            made, result = _within_limit(quantiser, images, plain, max_drop, advance)
        done = keep(made.draft, expected, facts, target, batch)
        return replace(done, int8=result, packed_layers=made.packed_layers)


def _check_numbers(calibrate_images: int, max_drop: float) -> None:
    problems = []
    if calibrate_images < 1:
        problems.append(f"--calibrate-images {calibrate_images} is not a number of images; give 1 or more")
    if not 0 <= max_drop <= 100:
        problems.append(f"--max-drop {max_drop:g} is not in points of accuracy; give 0 to 100, as in 1.0")
    if problems:
        raise RecipeError(problems)


@dataclass(frozen=True)
class _Images:
    """The images of an export.

    Attributes:
        calibration: preprocessed training images (B, C, H, W).
        loader: the images to evaluate on, in a fixed order.
        metric: what the level is judged by.
        parents: int64 (classes of the data,): the level's class of each; None if they are the same.
        count: number of images to evaluate on; 0 if it is not known.
    """

    calibration: Tensor
    loader: Loader
    metric: Metric
    parents: Tensor | None
    count: int

    @classmethod
    def open(
        cls,
        file: NestedFile,
        level: int,
        metric: Metric,
        calibrate_images: int,
        max_images: int | None,
        *,
        train_split: str | None,
        split: str | None,
        data: str,
        labels: str | None,
        data_root: str | None,
    ) -> "_Images":
        """Open the images, and read those to calibrate on."""
        model, held_out = file.manifest.model, file.manifest.held_out
        labelled = not metric.is_comparison
        calibration = Calibration.open(
            file,
            data,
            calibrate_images,
            train_split=train_split,
            labels=labels,
            data_root=data_root,
            labelled=labelled,
        )
        used, _ = open_evaluation_images(
            data,
            split,
            held_out,
            recorded_split(file.manifest.recipe),
            max_images=max_images,
            labelled=labelled,
            labels=labels,
            data_root=data_root,
            class_names=model.class_names,
            num_classes=model.num_classes,
        )
        loader = eval_loader(used, model.preprocessing.model_dump(), batch_size=32)
        parents = stored_class_levels(file.manifest).parents.get(level)
        return cls(calibration.images, loader, metric, parents, len(used))


@torch.no_grad()
def _within_limit(
    quantiser: Quantiser, images: _Images, plain: Runner, max_drop: float, advance: Progress
) -> tuple[Quantised, Int8]:
    """Return the int8 model with the fewest layers in float32 that was found to be within the limit."""
    kind = quantiser.kind
    saturates = kind.format is ExportFormat.onnx and not kind.reduce_range and sums_saturate()
    level = _predict(plain, images, advance)
    kept_float = 0
    while True:
        layers = quantiser.costliest(kept_float) if kept_float else []
        made = quantiser.make(layers)
        found = _predict(made.run, images, advance)
        before, score = (_score(images, each, level) for each in (level, found))
        result = Int8(
            metric=images.metric,
            float32_score=before,
            score=score,
            agreement=_percent(level.outputs == found.outputs) if images.metric.counts_images else None,
            images=len(level.outputs),
            calibration_images=len(images.calibration),
            float_layers=tuple(layers),
            reduce_range=kind.reduce_range,
            saturates=saturates,
        )
        if result.drop <= max_drop:
            return made, result
        kept_float = max(1, 2 * kept_float)
        if kept_float > len(quantiser.layers) // 2:
            raise GateFailed(
                f"int8 takes {quantiser.title} from {before:.2f} % to {score:.2f} % {images.metric.title} "
                f"({result.images} images; {len(layers)} of {len(quantiser.layers)} layers in float32), more "
                f"than --max-drop {max_drop:g}, so it was not kept; give "
                f"{'--reduce-range, as sums saturate on this processor, ' * saturates}more "
                "--calibrate-images, or a larger --max-drop"
            )


@dataclass(frozen=True)
class _Predictions:
    """Predicted classes (images,), or where there is no single class the outputs (images, C); and targets."""

    outputs: Tensor
    targets: Tensor


def _predict(run: Runner, images: _Images, advance: Progress) -> _Predictions:
    outputs, targets, done = [], [], 0
    for batch, target in images.loader:
        found = run(batch)
        outputs.append(found.argmax(-1) if images.metric.counts_images else found)
        targets.append(coarse_target(target, images.parents))
        advance(done := done + len(batch), images.count)
    if not outputs:
        raise DataError(f"{images.loader.images.source}: no images to evaluate on")
    return _Predictions(torch.cat(outputs), torch.cat(targets))


def _score(images: _Images, found: _Predictions, level: _Predictions) -> float:
    """Return the score of predictions in percent.

    Args:
        images: what was predicted.
        found: the predictions.
        level: those of the level in float32, for a comparison.
    """
    if images.metric is MAP:
        return 100 * float(average_precision(found.outputs, found.targets).nanmean())
    if images.metric is COSINE:
        return 100 * float(cosine_similarity([found.outputs], [level.outputs]).mean())
    return _percent(found.outputs == (level.outputs if images.metric.is_comparison else found.targets))


def _percent(which: Tensor) -> float:
    return 100 * float(which.double().mean())
