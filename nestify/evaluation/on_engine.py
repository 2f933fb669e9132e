"""Levels of a nested file on the sparse engine, in float32 or in int8, for commands that measure them."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nestify.data.loaders import eval_loader
from nestify.data.validation import open_calibration_images
from nestify.engine.export import as_network, cached_target, engine_network
from nestify.engine.library import load_library
from nestify.engine.session import Session, import_runtime
from nestify.errors import RecipeError
from nestify.evaluation.quantiser import Kind, Quantiser
from nestify.exports.draft import Runner, probes
from nestify.exports.target import ExportFacts, ExportFormat
from nestify.exports.write import keep
from nestify.file.loading import load_level
from nestify.file.reader import NestedFile

CALIBRATION_IMAGES = 100
"""Default number of training images from which the ranges of int8 activations are taken."""

TIMED_IMAGES = 16
"""Number of calibration images where only time is measured, which hardly depends on the ranges."""

INT8_MODELS = "2"
"""Version of the int8 models in the cache, raised when the same calibration gives another model."""

SEED = 0


@dataclass(frozen=True)
class Calibration:
    """The images from which the ranges of int8 activations are taken.

    Attributes:
        images: preprocessed images (B, C, H, W).
        source: where they are from, in words.
    """

    images: Tensor
    source: str

    @classmethod
    def open(
        cls,
        file: NestedFile,
        data: str | os.PathLike[str] | None,
        count: int = CALIBRATION_IMAGES,
        *,
        train_split: str | None = None,
        labels: str | None = None,
        data_root: str | None = None,
        labelled: bool = True,
    ) -> "Calibration":
        """Read training images, without those that the file's validation images were held out of them.

        Args:
            file: the nested file.
            data: images, as for `compress`; None for random numbers, which serve to measure time.
            count: number of images, balanced over the classes.
            train_split: name of the training split; None for that of the file, or `train`.
            labels: table of several labels per image, as for `compress`.
            data_root: folder of a named data set.
            labelled: whether the images have labels, which they are balanced by.

        Raises:
            RecipeError: if there is no such number of images.
            DataError: if the images are not right.
        """
        if count < 1:
            raise RecipeError(f"--calibrate-images {count} is not a number of images; give 1 or more")
        model = file.manifest.model
        if data is None:
            shape = (count, *model.preprocessing.input_size)
            return cls(torch.randn(shape, generator=torch.Generator().manual_seed(SEED)), "random images")
        training = open_calibration_images(
            os.fspath(data),
            file.manifest.held_out,
            count,
            split=train_split,
            labels=labels,
            data_root=data_root,
            class_names=model.class_names,
            num_classes=model.num_classes,
            labelled=labelled,
        )
        loader = eval_loader(training, model.preprocessing.model_dump(), batch_size=32)
        return cls(torch.cat([images for images, _ in loader])[:count], os.fspath(data))


def int8_model(
    file: NestedFile,
    number: int,
    images: Tensor,
    reduce_range: bool = False,
    cache: str | os.PathLike[str] | None = None,
) -> Path:
    """Return the path of a level's packed int8 model in a cache folder; it is made if it is not there.

    All of its layers are int8. `nestify.export` writes the same model if its loss of accuracy is allowed.

    Args:
        file: the nested file.
        number: number of the level.
        images: preprocessed calibration images (B, C, H, W).
        reduce_range: whether weights of dense layers have 7 bits; see `Kind`.
        cache: the folder; None for the user's cache folder.

    Raises:
        NestifyError: as `nestify.export`; SetupError if the engine's library is missing.
    """
    load_library()
    calibrated = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    keys = ["int8", INT8_MODELS, calibrated, *["reduced range"] * reduce_range, import_runtime().__version__]
    target = cached_target(file, number, keys, cache)
    if not target.path.is_file():
        facts, plain = ExportFacts.for_level(file.manifest, number), load_level(file, number)
        expected = probes(plain, facts, None)
        with tempfile.TemporaryDirectory(prefix="nestify-int8-") as folder:
            kind = Kind(ExportFormat.onnx, sparse=True, reduce_range=reduce_range)
            made = Quantiser(plain, facts, images, Path(folder), kind).make([])
            keep(made.draft, expected, facts, target, None)
    return target.path


def int8_network(file: NestedFile, number: int, images: Tensor, reduce_range: bool = False) -> Runner:
    """Return a level in int8 on the engine, with as many threads as torch has; see `int8_model`."""
    return as_network(Session(int8_model(file, number, images, reduce_range), torch.get_num_threads()))


def level_opener(
    file: NestedFile,
    device: torch.device,
    engine: bool,
    calibration: Calibration | None,
    reduce_range: bool = False,
) -> Callable[[int], Runner]:
    """Return a function that loads a level by its number.

    Args:
        file: the nested file.
        device: device that torch computes on.
        engine: whether the sparse engine runs the level, in place of torch.
        calibration: images to calibrate int8 on; None for float32.
        reduce_range: whether weights of dense int8 layers have 7 bits; see `Kind`.
    """
    if calibration is not None:
        return partial(int8_network, file, images=calibration.images, reduce_range=reduce_range)
    if engine:
        return partial(engine_network, file)
    return lambda number: load_level(file, number).to(device)


def check_int8(int8: bool, engine: bool, reduce_range: bool = False) -> None:
    """Refuse int8 without the engine, and a reduced range without int8.

    Raises:
        RecipeError: if it was asked for.
    """
    if int8 and not engine:
        raise RecipeError("--int8 is measured on the sparse engine; add --engine, or leave --int8 out")
    if reduce_range and not int8:
        raise RecipeError("--reduce-range has no use without --int8; add it, or leave the option out")
