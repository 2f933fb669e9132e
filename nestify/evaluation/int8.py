"""A level as an int8 ONNX model with packed layers, which is kept only if it is accurate enough."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestify.data.dataset import Images as DataImages
from nestify.data.dataset import open_images
from nestify.data.hierarchy import stored_class_levels
from nestify.data.loaders import Loader, eval_loader
from nestify.data.validation import open_evaluation_images
from nestify.engine.export import as_network
from nestify.engine.graph_int8 import make_sparse_int8
from nestify.engine.library import load_library
from nestify.engine.session import Session
from nestify.errors import GateFailed, RecipeError
from nestify.evaluation.accuracy import evaluate
from nestify.evaluation.runtimes import Images, quantise
from nestify.exports.draft import Runner, probes
from nestify.exports.onnx import import_packages, opset_of, translate
from nestify.exports.target import ExportFacts, ExportFormat, check_options, choose_target
from nestify.exports.write import Exported, Int8Accuracy
from nestify.file.loading import load_level
from nestify.file.reader import NestedFile, open_nested_file
from nestify.file.source import LocalFile
from nestify.files import atomic_file

FLOAT32, INT8 = 1, 2
SEED = 0
BATCH = 16


@dataclass(frozen=True)
class Int8Options:
    """How a level is quantised, and what is accepted.

    Attributes:
        data: images, as for `compress`; training images calibrate, and validation images check.
        calibrate_images: number of training images that the ranges of activations are taken from.
        max_drop: largest loss of top-1 against the level in float32, in points.
        max_images: largest number of validation images; None for all.
    """

    data: str
    calibrate_images: int = 100
    max_drop: float = 1.0
    max_images: int | None = None


def export_int8(
    path: str | os.PathLike[str],
    level: int | str,
    options: Int8Options,
    output: str | os.PathLike[str] | None = None,
    *,
    batch: int | None = None,
    opset: int | None = None,
) -> Exported:
    """Write one level as an int8 ONNX model with packed layers.

    Weights are quantised per channel, activations by the range that they have on training images. It runs
    where ONNX Runtime and the engine's library are; layers that are not packed are ONNX Runtime's int8.

    Args:
        path: a nested file, or its address.
        level: number or name of the level.
        options: images, and the accuracy that is required.
        output: an .onnx file; by default next to the nested file.
        batch: number of images per call; by default any number.
        opset: version of ONNX's operators.

    Raises:
        NestifyError: as `nestify.engine.export_sparse`; DataError if the images are not right, and GateFailed
            if the int8 model loses more accuracy than is accepted: then it is not kept.
    """
    load_library()
    for option, value in (
        ("--calibrate-images", options.calibrate_images),
        ("--max-images", options.max_images),
    ):
        if value is not None and value < 1:
            raise RecipeError(f"{option} {value} is less than 1; give 1 or more")
    file = open_nested_file(path, truncated=True)
    file.check_whole(number := file.level_index(str(level)))
    facts = ExportFacts.for_level(file.manifest, number)
    source = Path(file.name) if isinstance(file.source, LocalFile) else Path(PurePosixPath(file.name).name)
    target = choose_target(source, facts, str(ExportFormat.onnx), output)
    check_options(target.format, batch, opset)
    calibration = _calibration_images(file, options)
    validation, _ = open_evaluation_images(
        options.data,
        None,
        file.manifest.held_out,
        class_names=file.manifest.model.class_names,
        num_classes=file.manifest.model.num_classes,
        max_images=options.max_images,
        seed=SEED,
    )
    plain = load_level(file, number)
    [*_, probe] = probes(plain, facts, batch)
    model, packed = _int8_model(translate(plain, facts, batch, opset), calibration, facts, batch or 1)
    results: list[tuple[Int8Accuracy, float]] = []

    def check(written: Path) -> None:
        int8 = as_network(Session(written, torch.get_num_threads()))
        accuracy = _compare(file, number, plain, int8, _loader(file, validation), batch)
        difference = (int8(probe.images) - probe.logits).abs().max() / probe.logits.abs().max().clamp_min(
            1e-6
        )
        results.append((accuracy, float(difference)))
        if not accuracy.drop <= options.max_drop:
            raise GateFailed(
                f"{target.path}: in int8, {facts.title} has top-1 {accuracy.top1:.2f} %, which is "
                f"{accuracy.drop:.2f} points below float32, above --max-drop {options.max_drop:g}, so it was "
                "not kept; give more --calibrate-images, a level with less sparsity, or leave --int8 out"
            )

    with atomic_file(target.path, check) as written:
        written.write(model.SerializeToString())
    accuracy, difference = results[0]
    return Exported(
        path=target.path,
        format=target.format,
        facts=facts,
        bytes=target.path.stat().st_size,
        max_difference=difference,
        tolerance=None,
        batch=batch,
        opset=opset_of(model),
        load_line=f"nestify.engine.open({str(target.path)!r})(images)",
        packed_layers=packed,
        int8=accuracy,
    )


def _calibration_images(file: NestedFile, options: Int8Options) -> Images:
    """Return preprocessed training images (B, C, H, W), balanced over the classes."""
    model, held_out = file.manifest.model, file.manifest.held_out
    split = "train" if held_out is None else held_out.split
    found = open_images(options.data, split, class_names=model.class_names, num_classes=model.num_classes)
    if held_out is not None:
        found, _ = found.hold_out(held_out.share, held_out.seed)
    loader = _loader(file, found.at_most(options.calibrate_images, SEED))
    return torch.cat([images for images, _ in loader]).numpy()


def _loader(file: NestedFile, images: DataImages) -> Loader:
    return eval_loader(images, file.manifest.model.preprocessing.model_dump(), batch_size=BATCH)


def _int8_model(model: Any, images: Images, facts: ExportFacts, batch: int) -> tuple[Any, int]:
    """Return an ONNX model in int8 with packed layers, and their number."""
    images = np.resize(images, (-(-len(images) // batch) * batch, *images.shape[1:]))  # repeats the first
    onnx = import_packages()["onnx"]
    with tempfile.TemporaryDirectory(prefix="nestify-int8-") as folder:
        plain, int8 = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        plain.write_bytes(model.SerializeToString())
        quantise(plain, int8, images, batch)
        quantised = onnx.load(int8)
    onnx.helper.set_model_props(quantised, facts.metadata())
    choices = make_sparse_int8(quantised)
    return quantised, sum(choice.is_sparse for choice in choices)


def _compare(
    file: NestedFile, number: int, plain: Runner, int8: Runner, loader: Loader, batch: int | None
) -> Int8Accuracy:
    """Evaluate a level in float32 and in int8 on the same images."""
    agreed: list[Tensor] = []
    predicted: list[Tensor] = []

    def in_float32(images: Tensor) -> Tensor:
        logits = plain(images)
        predicted.append(logits.argmax(1))
        return logits

    def in_int8(images: Tensor) -> Tensor:
        count = len(images)
        filler = images[-1:].expand(-count % (batch or 1), -1, -1, -1)
        logits = int8(torch.cat([images, filler]))[:count]
        agreed.append(logits.argmax(1) == predicted.pop())
        return logits

    own = stored_class_levels(file.manifest).parents
    parents = {key: own[number] for key in (FLOAT32, INT8) if number in own}
    float32, quantised = evaluate({FLOAT32: in_float32, INT8: in_int8}, loader, parents=parents)
    return Int8Accuracy(
        images=quantised.images,
        float32_top1=float32.top1,
        top1=quantised.top1,
        agreement=100 * float(torch.cat(agreed).double().mean()),
    )
