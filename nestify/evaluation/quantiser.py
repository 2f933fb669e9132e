"""Int8 models of a level: all of its layers, or all but those that cost the most accuracy."""

from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nestify.errors import UnsupportedModelError, foreign_code
from nestify.evaluation.runtimes import optimise, quantise
from nestify.exports.draft import Draft, FolderDraft, Runner, quiet
from nestify.exports.onnx import load_line, model_draft, pictures_draft, reopen, translate
from nestify.exports.openvino import model_draft as openvino_draft
from nestify.exports.openvino import run_model
from nestify.exports.packages import import_package
from nestify.exports.target import ExportFacts, ExportFormat

AnyDraft = Draft | FolderDraft

LAYERS = ("Conv", "Gemm", "MatMul")
"""ONNX's operators that hold most weights; those that cost accuracy can stay in float32."""

PROBED_IMAGES = 16
"""Calibration images on which the error of each layer is measured."""

LOGIT_TOLERANCE = 1.0
"""Largest difference of a logit, relative to the largest: for broken files; accuracy is checked apart."""


class Quantiser:
    """Makes int8 models of one level.

    Args:
        plain: the level, in eval mode on the CPU.
        facts: what the export states about itself.
        images: calibration images (B, C, H, W).
        folder: an empty folder for models in between.
        format: onnx or openvino.
        batch: number of images per call; None for any number.
        opset: version of ONNX's operators; None for the default.

    Attributes:
        title: what messages call the level.
        layers: names of the layers that hold weights, in the order of the graph.

    Raises:
        RecipeError: if a package is missing.
        UnsupportedModelError: if the level cannot be translated or quantised.
    """

    def __init__(
        self,
        plain: nn.Module,
        facts: ExportFacts,
        images: Tensor,
        folder: Path,
        format: ExportFormat,
        batch: int | None,
        opset: int | None,
    ) -> None:
        self.title = facts.title
        self._facts, self._images, self._folder, self._format = facts, images, folder, format
        self._plain, self._batch = plain, batch
        if format is ExportFormat.openvino:
            import_package("openvino", "openvino", "openvino", "about 180 MB")
        exported = folder / "float32.onnx"
        exported.write_bytes(translate(plain, facts, batch, opset).SerializeToString())
        self._model = folder / "optimised.onnx"
        optimise(exported, self._model)
        graph = import_module("onnx").load(self._model, load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer}
        self.layers = [
            node.name
            for node in graph.node
            if node.op_type in LAYERS and any(name in weights for name in node.input)
        ]

    def draft(self, float_layers: Sequence[str], pictures: bool = False) -> tuple[AnyDraft, Runner]:
        """Return an int8 model before it is written, and what runs it on preprocessed images.

        Args:
            float_layers: names of the layers that stay in float32.
            pictures: whether the written model takes pictures and preprocesses them, for onnx.
        """
        path = self._quantise(self._images, [name for name in self.layers if name in set(float_layers)])
        model = import_module("onnx").load(path)
        import_module("onnx").helper.set_model_props(model, self._facts.metadata())
        if pictures:
            return pictures_draft(model, self._facts, LOGIT_TOLERANCE, "int8"), reopen(path)
        if self._format is ExportFormat.onnx:
            return model_draft(model, reopen, load_line, LOGIT_TOLERANCE, "int8"), reopen(path)
        openvino = import_package("openvino", "openvino", "openvino")

        def refusal(reason: str) -> UnsupportedModelError:
            return UnsupportedModelError(
                f"OpenVINO cannot translate {self.title} in int8 ({reason}); give --format onnx"
            )

        with foreign_code(refusal), quiet():
            translated = openvino.convert_model(path)
            translated.reshape([self._batch or -1, *self._facts.input_size])
        draft = openvino_draft(translated, self._facts, "int8", LOGIT_TOLERANCE)
        return draft, run_model(translated)

    def costliest(self, count: int) -> list[str]:
        """Return the layers whose quantisation alone changes the logits most, the worst first.

        Args:
            count: how many.
        """
        return self._by_cost[:count]

    @cached_property
    def _by_cost(self) -> list[str]:
        images = self._images[:PROBED_IMAGES]
        with torch.no_grad():
            exact = self._plain(images)

        def cost(layer: str) -> float:  # with all other layers in float32
            run = reopen(self._quantise(images, [name for name in self.layers if name != layer]))
            return float((run(images) - exact).square().mean())

        errors = {layer: cost(layer) for layer in self.layers}
        return sorted(errors, key=lambda layer: -errors[layer])

    def _quantise(self, images: Tensor, float_layers: Sequence[str]) -> Path:
        path = self._folder / "int8.onnx"
        quantise(self._model, path, images.numpy().astype(np.float32), float_layers)
        return path
