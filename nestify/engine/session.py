"""Running a level on the engine, with NumPy and ONNX Runtime alone."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestify.engine.library import load_library
from nestify.errors import BadFileError, DataError, RecipeError, SetupError, foreign_code
from nestify.machine import cores

MOST_THREADS = 1024
THREADS_ENTRY = "nestify.threads"
"""Session configuration entry that tells the engine's operators the number of threads; see native/ops.cpp."""


class Session:
    """A level of a nested model, or a whole ONNX model, that runs on the CPU.

    Args:
        path: an ONNX model, with or without packed layers.
        threads: number of threads; None for one per processor that this process may use.

    Attributes:
        path: path of the model.
        threads: number of threads.

    Raises:
        SetupError: if onnxruntime or the engine's library is missing or does not fit.
        BadFileError: if the model cannot be loaded, for instance because a packed layer is damaged.
        RecipeError: if `threads` is out of its range.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        self.path = Path(path)
        self.threads = cores() if threads is None else threads
        if not 1 <= self.threads <= MOST_THREADS:
            raise RecipeError(f"threads = {threads} is not from 1 to {MOST_THREADS}")
        if not os.path.isfile(self.path):
            raise BadFileError(f"{self.path}: there is no such file; check the path")
        self._session = start_session(self.path, self.threads)
        images = self._session.get_inputs()[0]
        self._input, self._shape = images.name, tuple(images.shape)
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._batch = self._shape[0] if isinstance(self._shape[0], int) else None

    def __call__(self, images: NDArray[Any]) -> Any:
        """Compute logits, an embedding or feature maps, image by image, which is faster than in batches.

        Args:
            images: (B, C, H, W), preprocessed as `metadata["preprocessing"]` says; B is a multiple of the
                batch size if the model is fixed to one.

        Returns:
            float32 (B, classes) or (B, C); a list of such arrays if the model returns several feature maps.

        Raises:
            DataError: if the images do not have the model's shape.
        """
        images, step = np.asarray(images), self._batch or 1
        wanted = tuple(extent if isinstance(extent, int) else None for extent in self._shape[1:])
        fits = images.ndim == len(self._shape) and all(
            due in (None, extent) for due, extent in zip(wanted, images.shape[1:], strict=True)
        )
        if not fits or not len(images) or len(images) % step:
            raise DataError(
                f"images of shape {tuple(images.shape)} do not fit {self.path.name}, which takes "
                f"{self._shape}; preprocess them as its metadata says"
            )
        images = np.ascontiguousarray(images, np.float32)
        with foreign_code(
            lambda reason: DataError(f"{self.path.name} does not run on these images ({reason})")
        ):
            parts = [
                self._session.run(self._outputs, {self._input: images[first : first + step]})
                for first in range(0, len(images), step)
            ]
        columns = list(zip(*parts, strict=True))
        found = [np.concatenate(each) if len(each) > 1 else np.asarray(each[0]) for each in columns]
        return found if len(found) > 1 else found[0]

    @property
    def input_size(self) -> Sequence[int | str]:
        """Shape of one image: channels, height, width; a name where any number is accepted."""
        return self._shape[1:]

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """What the model says about itself: level, classes, preprocessing, and the packed layers."""
        texts = self._session.get_modelmeta().custom_metadata_map
        return {key: _from_json(text) for key, text in texts.items()}


def start_session(path: Path, threads: int, *, profile: Path | None = None) -> Any:
    """Return a session of ONNX Runtime with the engine's operators.

    Args:
        path: the model.
        threads: number of threads.
        profile: start of the name of a file for the times of all nodes; None for no such file.

    Raises:
        NestifyError: as `Session`.
    """
    runtime = import_runtime()
    library = load_library()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal; errors are raised
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    options.add_session_config_entry(THREADS_ENTRY, str(threads))
    with foreign_code(
        lambda reason: SetupError(
            f"onnxruntime {runtime.__version__} refuses the engine's library ({reason})"
        )
    ):
        options.register_custom_ops_library(str(library.path))
    with foreign_code(
        lambda reason: BadFileError(f"{path}: onnxruntime cannot load it ({reason}); export it again")
    ):
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def import_runtime() -> Any:
    """Import onnxruntime.

    Raises:
        SetupError: if it is not installed.
    """
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise SetupError("the engine needs the package onnxruntime; pip install onnxruntime") from error


def _from_json(text: str) -> Any:
    """Return the value of a metadata entry; texts that are no JSON are themselves."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
