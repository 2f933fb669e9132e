"""Int8 models of a level: all of its layers, or all but those that cost the most accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from nestify.engine.export import as_network, packed_load_line, reopen_packed
from nestify.engine.library import load_library
from nestify.engine.session import Session
from nestify.evaluation.runtimes import optimise, quantise_optimised
from nestify.exports.draft import Draft, FolderDraft, Runner
from nestify.exports.onnx import load_line, model_draft, pictures_draft, reopen, translate
from nestify.exports.openvino import import_openvino, run_model, with_preprocessing
from nestify.exports.openvino import model_draft as openvino_draft
from nestify.exports.openvino import translate as to_openvino
from nestify.exports.target import ExportFacts, ExportFormat

LAYERS = ("Conv", "Gemm", "MatMul")
"""ONNX's operators that hold most weights; those that cost accuracy can stay in float32."""

PROBED_IMAGES = 16
"""Calibration images on which the error of each layer is measured."""

LOGIT_TOLERANCE = 1.0
"""Largest difference of a logit, relative to the largest: for broken files; accuracy is checked apart."""


@dataclass(frozen=True)
class Kind:
    """What kind of int8 models is made.

    Attributes:
        format: onnx or openvino.
        batch: number of images per call; None for any number.
        opset: version of ONNX's operators; None for the default.
        sparse: whether sparse layers are packed for the sparse engine, for onnx.
        pictures: whether the written model takes pictures and preprocesses them.
        reduce_range: whether weights have 7 bits, with which sums saturate on no processor.
    """

    format: ExportFormat
    batch: int | None = None
    opset: int | None = None
    sparse: bool = False
    pictures: bool = False
    reduce_range: bool = False


@dataclass(frozen=True)
class Quantised:
    """An int8 model before it is written.

    Attributes:
        draft: writes it.
        run: runs it on preprocessed images, for batches of any size.
        packed_layers: number of layers that are packed for the engine; None if none are asked for.
    """

    draft: Draft | FolderDraft
    run: Runner
    packed_layers: int | None = None


class Quantiser:
    """Makes int8 models of one level.

    Args:
        plain: the level, in eval mode on the CPU.
        facts: what the export states about itself.
        images: calibration images (B, C, H, W).
        folder: an empty folder for models in between.
        kind: what kind of models.

    Attributes:
        title: what messages call the level.
        kind: what kind of models.
        layers: names of the layers that hold weights, in the order of the graph.

    Raises:
        RecipeError: if a package is missing.
        SetupError: if the engine's library is missing.
        UnsupportedModelError: if the level cannot be translated or quantised.
    """

    def __init__(
        self, plain: nn.Module, facts: ExportFacts, images: Tensor, folder: Path, kind: Kind
    ) -> None:
        # What is missing is reported before the work.
        if kind.sparse:
            load_library()
        if kind.format is ExportFormat.openvino:
            import_openvino()
        self.title, self.kind = facts.title, kind
        self._plain, self._facts, self._images, self._folder = plain, facts, images, folder
        exported = folder / "float32.onnx"
        exported.write_bytes(translate(plain, facts, kind.batch, kind.opset).SerializeToString())
        self._model = folder / "optimised.onnx"
        optimise(exported, self._model)
        graph = import_module("onnx").load(self._model, load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer}
        self.layers = [
            node.name
            for node in graph.node
            if node.op_type in LAYERS and any(name in weights for name in node.input)
        ]

    def make(self, float_layers: Sequence[str]) -> Quantised:
        """Return an int8 model.

        Args:
            float_layers: names of the layers that stay in float32.
        """
        path = self._quantise(self._images, float_layers)
        if self.kind.format is ExportFormat.openvino:
            translated = to_openvino(path, self._facts, self.kind.batch)
            run = self._padded(run_model(translated))
            if self.kind.pictures:
                translated = with_preprocessing(translated, self._facts, self.kind.batch)
            name = "pictures" if self.kind.pictures else "images"
            draft = openvino_draft(translated, self._facts, "int8", LOGIT_TOLERANCE, name)
            return Quantised(draft, run)
        onnx = import_module("onnx")
        model = onnx.load(path)
        onnx.helper.set_model_props(model, self._facts.metadata())
        if self.kind.sparse:
            from nestify.engine.graph_int8 import make_sparse_int8  # needs the onnx package

            packed = sum(choice.is_sparse for choice in make_sparse_int8(model))
            path.write_bytes(model.SerializeToString())
            run = as_network(Session(path, torch.get_num_threads()))
            made = model_draft(model, reopen_packed, packed_load_line, LOGIT_TOLERANCE, "int8")
            return Quantised(made, self._padded(run), packed)
        if self.kind.pictures:
            made = pictures_draft(model, self._facts, LOGIT_TOLERANCE, "int8")
        else:
            line = partial(load_line, kind=self._facts.output)
            made = model_draft(model, reopen, line, LOGIT_TOLERANCE, "int8")
        return Quantised(made, self._padded(reopen(path)))

    def _padded(self, run: Runner) -> Runner:
        """Return a runner for batches of any size of a model for batches of one size."""
        if (size := self.kind.batch) is None:
            return run

        def padded(images: Tensor) -> Tensor:
            filler = images[-1:].expand(-len(images) % size, -1, -1, -1)
            parts = torch.cat([images, filler]).split(size)
            return torch.cat([run(part) for part in parts])[: len(images)]

        return padded

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
            run = self._padded(
                reopen(self._quantise(images, [name for name in self.layers if name != layer]))
            )
            return float((run(images) - exact).square().mean())

        errors = {layer: cost(layer) for layer in self.layers}
        return sorted(errors, key=lambda layer: -errors[layer])

    def _quantise(self, images: Tensor, float_layers: Sequence[str]) -> Path:
        path, kind = self._folder / "int8.onnx", self.kind
        quantise_optimised(
            self._model, path, images.numpy(), float_layers, kind.batch or 1, kind.reduce_range
        )
        return path
