"""A level as an ONNX model: images in, logits, an embedding or feature maps out, one file."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from nestify.errors import RecipeError, UnsupportedModelError
from nestify.exports import preprocessing
from nestify.exports.draft import FLOAT32_TOLERANCE, Draft, Runner, first_line, quiet
from nestify.exports.packages import import_package
from nestify.exports.preprocessing import prepend_preprocessing
from nestify.exports.pt2 import capture
from nestify.exports.target import ExportFacts
from nestify.model.feature_maps import Outputs
from nestify.model.outputs import OutputKind, output_names

DEFAULT_OPSET = 18
"""The version that torch's translations are written in, so that nothing has to be converted; ONNX Runtime
reads it since 1.14 (2023), and other runtimes of that age do."""

MAX_BYTES = 2**31 - 1
"""Largest size of an ONNX file, which is one protobuf message."""


def onnx_draft(
    plain: nn.Module, facts: ExportFacts, batch: int | None, opset: int | None, pictures: bool = False
) -> Draft:
    """Translate a level to ONNX; see `translate` for the other arguments and errors.

    Args:
        pictures: whether the model takes pictures and preprocesses them; see `prepend_preprocessing`.
    """
    model = translate(plain, facts, batch, opset)
    if pictures:
        return pictures_draft(model, facts)
    return model_draft(model, reopen, partial(load_line, kind=facts.output))


def pictures_draft(model: Any, facts: ExportFacts, tolerance: float = 0.0, dtype: str = "float32") -> Draft:
    """Return the draft of an ONNX model with the preprocessing put before it.

    Args:
        model: the model as a protobuf message, which takes preprocessed images.
        facts: what the export states about itself.
        tolerance: see `Draft`; at least that of the preprocessing.
        dtype: see `Draft`.
    """
    joined = prepend_preprocessing(model, facts, opset_of(model))
    return model_draft(
        joined,
        reopen,
        partial(load_line, kind=facts.output, name="pictures"),
        max(tolerance, preprocessing.TOLERANCE),
        dtype,
    )


def model_draft(
    model: Any,
    reopen: Callable[[Path], Runner],
    load_line: Callable[[Path], str],
    tolerance: float = FLOAT32_TOLERANCE,
    dtype: str = "float32",
) -> Draft:
    """Return the draft of an ONNX model.

    Args:
        model: the model as a protobuf message.
        reopen: see `Draft`, as the other arguments.
    """

    def write(file: BinaryIO) -> None:
        file.write(model.SerializeToString())

    runtime = f"onnxruntime {_package('onnxruntime').__version__}"
    return Draft(write, reopen, load_line, tolerance, runtime, opset_of(model), dtype)


def translate(plain: nn.Module, facts: ExportFacts, batch: int | None, opset: int | None) -> Any:
    """Translate a level to ONNX, and return the model as a protobuf message.

    Args:
        plain: the level, in eval mode on the CPU.
        batch: number of images per call; None for any number.
        opset: version of ONNX's operators; None for `DEFAULT_OPSET`.

    Raises:
        RecipeError: if a package is missing, or there is no such opset.
        UnsupportedModelError: if torch cannot trace the model, ONNX lacks an operator, or it is too large.
    """
    opset = DEFAULT_OPSET if opset is None else opset
    graph = trace(plain, facts, batch, opset)
    optimise(graph, facts, opset)
    model = serialise(graph, facts)
    _check_size(model.ByteSize(), facts)
    return model


def trace(plain: nn.Module, facts: ExportFacts, batch: int | None, opset: int) -> Any:
    """Translate a level to a graph that is not optimised yet, in which weights have their state-dict names.

    The values of weights do not change the graph, and it shares their memory.

    Returns:
        The graph, an `onnx_ir.Model`.

    Raises:
        NestifyError: as `translate`.
    """
    newest = import_packages()["onnx"].defs.onnx_opset_version()
    if not 1 <= opset <= newest:
        raise RecipeError(
            f"opset {opset} is not a version of ONNX; give --opset 1 to {newest}, such as {DEFAULT_OPSET}"
        )
    _check_size(sum(t.numel() * t.element_size() for t in plain.state_dict().values()), facts)
    program = capture(plain, facts, batch)
    with _translating(facts):
        translated = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            optimize=False,
            input_names=["images"],
            output_names=output_names(facts.output, len(facts.feature_channels)),
            dynamic_shapes=None if batch else ({0: "batch"},),  # only its name; the program has the rest
            verbose=False,
        )
        assert translated is not None
        return translated.model


def optimise(graph: Any, facts: ExportFacts, opset: int = DEFAULT_OPSET) -> None:
    """Optimise a graph of `trace` in place, as torch's exporter does: batch norm is folded, constants too.

    Raises:
        UnsupportedModelError: if it cannot be written in this version of ONNX's operators.
    """
    with _translating(facts):
        torch.onnx.ONNXProgram(graph, None).optimize()
        # The nodes' metadata names modules of torch and timm, and is as large as a small model.
        import_module("onnx_ir.passes.common").ClearMetadataAndDocStringPass()(graph)
    if (reached := graph.opset_imports.get("")) != opset:
        raise UnsupportedModelError(
            f"{facts.title} cannot be written in opset {opset}; give --opset {reached}, or leave it out"
        )


def serialise(graph: Any, facts: ExportFacts) -> Any:
    """Return a graph as a protobuf message with the level's facts."""
    model = import_module("onnx_ir").to_proto(graph)
    import_packages()["onnx"].helper.set_model_props(model, facts.metadata())
    return model


def opset_of(model: Any) -> int:
    """Return the version of ONNX's operators that a model uses."""
    return int({entry.domain: entry.version for entry in model.opset_import}.get("", 0))


def import_packages() -> dict[str, Any]:
    """Import the packages that the format needs, and return them by name.

    Raises:
        RecipeError: if one is missing.
    """
    return {name: _package(name) for name in ("onnx", "onnxscript", "onnxruntime")}


def _package(name: str) -> Any:
    return import_package(name, "onnx", "onnx", "about 120 MB")


def _check_size(size: int, facts: ExportFacts) -> None:
    if size > MAX_BYTES:
        raise UnsupportedModelError(
            f"{facts.title} has {size} bytes, and an ONNX file holds at most {MAX_BYTES}; "
            "export it as pt2 or timm"
        )


@contextmanager
def _translating(facts: ExportFacts) -> Iterator[None]:
    """Turn what the block raises into an error about the model."""
    try:
        # With gradients enabled, attention would be decomposed in another memory layout than the traced one.
        with quiet(), torch.no_grad():
            yield
    except Exception as error:  # any exception of the translation is about this model
        raise UnsupportedModelError(_why(error, facts)) from error


def _why(error: BaseException, facts: ExportFacts) -> str:
    """Name the operator that stopped the translation, or else the first cause."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if missing := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(cause)):
        return f"ONNX has no operator for {missing[1]}, which {facts.title} uses; export it as pt2 or timm"
    return f"torch cannot translate {facts.title} to ONNX ({first_line(cause)}); export it as pt2 or timm"


def reopen(path: Path) -> Runner:
    """Check an ONNX model, and load it with onnxruntime."""
    import_module("onnx").checker.check_model(os.fspath(path), full_check=True)
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> Outputs:
        found = [torch.from_numpy(array) for array in session.run(outputs, {name: images.numpy()})]
        return found if len(found) > 1 else found[0]

    return run


def load_line(path: Path, kind: OutputKind = "logits", name: str = "images") -> str:
    """Return one line of Python that runs the ONNX model at a path.

    Args:
        path: the model.
        kind: what it returns.
        name: name of its input.
    """
    outputs = None if kind == "features" else [kind]
    return f"onnxruntime.InferenceSession({str(path)!r}).run({outputs}, {{{name!r}: {name}}})"
