"""A level as a Core ML package (`.mlpackage`) for Apple's devices; sparse weights are stored sparse."""

import platform
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestify.errors import UnsupportedModelError, foreign_code
from nestify.exports.draft import FLOAT16_TOLERANCE, FLOAT32_TOLERANCE, FolderDraft, Runner, quiet
from nestify.exports.packages import import_package
from nestify.exports.pt2 import capture
from nestify.exports.target import ExportFacts

SPARSE_FROM = 0.3
"""Sparsity from which Core ML's tools store a tensor sparse; below, the list of places is too large."""

INT8_FROM = 512
"""Number of weights from which a tensor is stored as int8."""

LOGIT_TOLERANCES = {"float16": FLOAT16_TOLERANCE, "float32": FLOAT32_TOLERANCE, "int8": 0.2}
"""Largest difference of a logit, relative to the largest; for int8 it detects a broken file only."""

WEIGHT_TOLERANCES = {"float16": 5e-3, "float32": 1e-5, "int8": 1e-2}
"""Largest difference of a stored weight, relative to the largest of its tensor."""

Values = NDArray[np.floating[Any]]


def coreml_draft(plain: nn.Module, facts: ExportFacts, batch: int | None, dtype: str) -> FolderDraft:
    """Translate a level to a Core ML program.

    On macOS its logits are compared with the level's. Elsewhere Core ML does not run, so that the stored
    weights are expanded and compared with those of an uncompressed translation.

    Args:
        plain: the level, in eval mode on the CPU.
        facts: what the export states about itself.
        batch: number of images per call.
        dtype: type of weights and activations, float16 or float32; int8 is weights alone, per channel.

    Raises:
        RecipeError: if the package is missing.
        UnsupportedModelError: if torch cannot trace the model, or Core ML's tools cannot translate it.
    """
    tools = _package()
    program = capture(plain, facts, batch or 1)

    def refusal(reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"Core ML's tools cannot translate {facts.title} ({reason}); export it as onnx"
        )

    with foreign_code(refusal), quiet():
        program = program.run_decompositions({})
        model = _translate(program, facts, batch or 1, dtype)
        exact = _translate(program, facts, batch or 1, None)
    model.short_description = f"{facts.title}, {facts.document()['producer']}"
    model.user_defined_metadata.update({f"nestify.{key}": value for key, value in facts.metadata().items()})

    def fill(folder: Path) -> None:
        saved = folder / "model.mlpackage"  # the suffix is required
        model.save(str(saved))
        for entry in saved.iterdir():
            entry.rename(folder / entry.name)
        saved.rmdir()
        (folder / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # names of traced nodes

    def compare(folder: Path) -> float:
        return _largest_difference(_stored_weights(folder), _weights(exact))

    on_mac = platform.system() == "Darwin"
    return FolderDraft(
        fill=fill,
        reopen=partial(_reopen, name=facts.output) if on_mac else None,
        load_line=partial(_load_line, name=facts.output),
        tolerance=(LOGIT_TOLERANCES if on_mac else WEIGHT_TOLERANCES)[dtype],
        runtime=f"coremltools {tools.__version__}",
        compare=compare,
        dtype=dtype,
    )


def _package() -> Any:
    return import_package("coremltools", "coreml", "coreml", "about 60 MB")


def _translate(program: Any, facts: ExportFacts, batch: int, dtype: str | None) -> Any:
    """Translate a program; a `dtype` of None keeps the weights as they are: float32, uncompressed."""
    tools = _package()
    sparse = dtype is not None and facts.sparsity >= SPARSE_FROM
    # iOS 16 is the first that reads sparse weights, iOS 18 the first that reads sparse int8.
    system = tools.target.iOS18 if sparse and dtype == "int8" else tools.target.iOS16
    precision = tools.precision.FLOAT32 if dtype in (None, "float32") else tools.precision.FLOAT16
    model = tools.convert(
        program,
        inputs=[tools.TensorType(name="images", shape=(batch, *facts.input_size))],
        outputs=[tools.TensorType(name=facts.output)],
        convert_to="mlprogram",
        compute_precision=precision,
        minimum_deployment_target=system,
        pass_pipeline=tools.PassPipeline.DEFAULT_PRUNING if sparse else tools.PassPipeline.DEFAULT,
        skip_model_load=platform.system() != "Darwin",
    )
    if dtype != "int8":
        return model
    optimize = tools.optimize.coreml
    config = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=INT8_FROM)
    return optimize.linear_quantize_weights(
        model, optimize.OptimizationConfig(global_config=config), joint_compression=sparse
    )


def _stored_weights(folder: Path) -> list[Values]:
    """Return the weights that a package stores, expanded from sparse and int8 forms."""
    tools = _package()
    link = folder.with_name(f"{folder.name}.mlpackage")  # the suffix is required
    link.symlink_to(folder.resolve(), target_is_directory=True)
    try:
        stored = tools.models.MLModel(str(link), skip_model_load=True)
        return _weights(tools.optimize.coreml.decompress_weights(stored))
    finally:
        link.unlink()


def _weights(model: Any) -> list[Values]:
    """Return the constant tensors of a model that are large enough to be weights."""
    program = model._mil_program
    values = [
        operation.outputs[0].val
        for function in program.functions.values()
        for operation in function.operations
        if operation.op_type.startswith("const")
    ]
    return [
        value.astype(np.float64)
        for value in values
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size > 1
    ]


def _largest_difference(stored: list[Values], exact: list[Values]) -> float:
    """Return the largest difference of a weight, relative to the largest of its tensor.

    Tensors have other names in each translation, so each is compared with the nearest of its shape.
    """
    if sorted(value.shape for value in stored) != sorted(value.shape for value in exact):
        return float("inf")
    worst, left = 0.0, list(stored)
    for value in exact:
        scale = max(float(np.abs(value).max()), 1e-12)
        off = [
            float(np.abs(other - value).max()) / scale if other.shape == value.shape else float("inf")
            for other in left
        ]
        nearest = int(np.argmin(off))
        worst = max(worst, off[nearest])
        del left[nearest]
    return worst


def _reopen(folder: Path, name: str) -> Runner:
    model = _package().models.MLModel(str(folder))

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(model.predict({"images": images.numpy()})[name]))

    return run


def _load_line(folder: Path, name: str) -> str:
    return f"coremltools.models.MLModel({str(folder)!r}).predict({{'images': images}})[{name!r}]"
