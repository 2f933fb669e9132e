"""A level as an OpenVINO model: a folder with `openvino_model.xml` and `openvino_model.bin`."""

import functools
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestify.errors import UnsupportedModelError, foreign_code
from nestify.exports.draft import FLOAT16_TOLERANCE, FLOAT32_TOLERANCE, FolderDraft, Runner, quiet
from nestify.exports.packages import import_package
from nestify.exports.picture_input import PictureInput, input_name
from nestify.exports.pt2 import capture
from nestify.exports.target import ExportFacts
from nestify.model.feature_maps import Outputs
from nestify.model.outputs import output_names

FILE = "openvino_model.xml"
"""Name of the file that OpenVINO reads, as in the folders of other programs; the weights are next to it."""


def openvino_draft(plain: nn.Module, facts: ExportFacts, batch: int | None, dtype: str) -> FolderDraft:
    """Translate a level to OpenVINO.

    Args:
        plain: the level, in eval mode on the CPU, or with its preprocessing as a `PictureInput`.
        facts: what the export states about itself.
        batch: number of images per call; None for any number.
        dtype: type that weights are stored as: float32 or float16.

    Raises:
        RecipeError: if the package is missing.
        UnsupportedModelError: if torch cannot trace the model, or OpenVINO cannot translate it.
    """
    name = input_name(plain)
    model = translate(capture(plain, facts, batch), facts, batch, name)
    tolerance = FLOAT16_TOLERANCE if dtype == "float16" else FLOAT32_TOLERANCE
    return model_draft(model, facts, dtype, tolerance, name)


def translate(program: Any, facts: ExportFacts, batch: int | None, name: str = "images") -> Any:
    """Translate a program of `torch.export`, or the ONNX model at a path, to an OpenVINO model.

    Args:
        program: the program or path.
        facts: what the export states about itself.
        batch: number of images per call; None for any number.
        name: what it takes, images or pictures; see `input_name`.

    Raises:
        RecipeError: if the package is missing.
        UnsupportedModelError: if OpenVINO cannot translate it, with the operator that it lacks.
    """
    openvino = import_openvino()

    def refusal(reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"OpenVINO cannot translate {facts.title} ({reason}); export it as onnx")

    with foreign_code(refusal), quiet():
        try:
            model = openvino.convert_model(program)
        except Exception as error:
            if missing := re.search(r"No conversion rule found for operations: ([\w., ]+)", str(error)):
                raise refusal(f"it lacks {missing[1]}") from error
            raise
        channels, height, width = facts.input_size
        shape = [channels, height, width] if name == "images" else [-1, -1, channels]
        model.reshape([batch or -1, *shape])
    return model


def with_preprocessing(model: Any, facts: ExportFacts, batch: int | None) -> Any:
    """Return an OpenVINO model with the preprocessing put before it, which takes pictures.

    Args:
        model: a model that takes images; it becomes part of the result.
        facts: what the export states about itself.
        batch: number of pictures per call; None for any number.

    Raises:
        UnsupportedModelError: if the resize or the crop has a form that is not supported.
    """
    alone = PictureInput(nn.Identity(), facts).eval()
    before = translate(capture(alone, facts, batch), facts, batch, "pictures")
    [made], [images] = before.outputs, model.inputs
    for reader in images.get_target_inputs():
        reader.replace_source_output(made.get_node().input_value(0))
    return import_openvino().Model(model.get_results(), before.get_parameters(), model.get_friendly_name())


def model_draft(
    model: Any, facts: ExportFacts, dtype: str, tolerance: float, name: str = "images"
) -> FolderDraft:
    """Return the draft of an OpenVINO model with one input.

    Args:
        model: the model; its outputs get those of `output_names`.
        facts: what the export states about itself.
        dtype: type that weights are stored as: float32, float16 or int8.
        tolerance: largest allowed difference of a logit, relative to the largest logit.
        name: name that its input gets, images or pictures.
    """
    openvino = import_openvino()
    [images] = model.inputs
    images.get_tensor().set_names({name})
    names = output_names(facts.output, len(model.outputs))
    for output, output_name in zip(model.outputs, names, strict=True):
        output.get_tensor().set_names({output_name})
    for key, value in facts.metadata().items():
        model.set_rt_info(value, ["nestify", key])
    if facts.class_names is not None:  # where OpenVINO's own programs look for them
        model.set_rt_info(json.dumps(list(facts.class_names), ensure_ascii=False), ["model_info", "labels"])

    def fill(folder: Path) -> None:
        openvino.save_model(model, folder / FILE, compress_to_fp16=dtype == "float16")

    return FolderDraft(
        fill=fill,
        reopen=_reopen,
        load_line=partial(_load_line, name=name, output=names[0]),
        tolerance=tolerance,
        runtime=f"openvino {str(openvino.__version__).partition('-')[0]}",
        dtype=dtype,
    )


def import_openvino() -> Any:
    """Import OpenVINO.

    Raises:
        RecipeError: if it is missing.
    """
    return import_package("openvino", "openvino", "openvino", "about 180 MB")


@functools.cache
def openvino_core() -> Any:
    """Return the one `openvino.Core` of this process, which lives as long as the process.

    On processors with AMX the CPU plugin of a Core gives the process a stack for signal handlers, and at the
    end of the Core puts the earlier one back. If two Cores do not end in the reverse order, that is memory
    which is no longer there, and the next signal with a Python handler, such as the SIGCHLD of a worker
    process of `torch.utils.data.DataLoader`, ends the process.

    Raises:
        RecipeError: if OpenVINO is missing.
    """
    return import_openvino().Core()


def _reopen(folder: Path) -> Runner:
    return run_model(folder / FILE)


def run_model(model: Any) -> Runner:
    """Compile an OpenVINO model, or the one at a path, for the CPU, and return what runs it."""
    # By default the CPU plugin may compute in bfloat16, which differs by a hundred times more.
    compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(images: Tensor) -> Outputs:
        found = compiled(images.numpy())
        outputs = [torch.from_numpy(found[place].copy()) for place in range(len(compiled.outputs))]
        return outputs if len(outputs) > 1 else outputs[0]

    return run


def _load_line(folder: Path, name: str, output: str) -> str:
    return f"openvino.compile_model({str(folder / FILE)!r}, 'CPU')({name})[{output!r}]"
