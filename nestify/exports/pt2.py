"""A level as a `torch.export` program, which torch loads without timm or nestify."""

import json
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from nestify.errors import UnsupportedModelError
from nestify.exports.draft import Draft, Runner, first_line, quiet
from nestify.exports.picture_input import PictureInput, input_name
from nestify.exports.target import ExportFacts
from nestify.model.feature_maps import Outputs
from nestify.model.spec import synthetic_input

TRACED_BATCH = 2
"""Torch takes a dimension of size 1 for a constant."""

TRACED_SIDES = (40, 56)
"""Height and width of pictures that a level with its preprocessing is traced with; no size is special."""


def capture(
    plain: nn.Module,
    facts: ExportFacts,
    batch: int | None,
    largest: int | None = None,
    largest_side: int | None = None,
) -> ExportedProgram:
    """Trace a model for images of its input size, or a `PictureInput` for pictures of any size.

    Args:
        plain: the level, in eval mode on the CPU.
        batch: number of images per call; None for any number.
        largest: largest number of images per call, if any number is allowed; None for no limit.
        largest_side: largest height and width of pictures; None for no limit.

    Returns:
        A program without the source locations of its nodes.

    Raises:
        UnsupportedModelError: if torch cannot trace the model.
    """
    free = {} if batch else {0: Dim("batch", max=largest)}
    if isinstance(plain, PictureInput):
        images = torch.zeros(batch or TRACED_BATCH, *TRACED_SIDES, facts.input_size[0], dtype=torch.uint8)
        free |= {1: Dim("height", max=largest_side), 2: Dim("width", max=largest_side)}
    else:
        images = synthetic_input(facts.input_size, batch or TRACED_BATCH)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                plain, (images,), dynamic_shapes=(free,) if free else None, strict=False
            )
    except Exception as error:  # any exception of tracing is about this model
        what, remedy = "", "export it as timm"
        if batch is None:
            what, remedy = " for batches of any size", "try --batch 1, or export it as timm"
        raise UnsupportedModelError(
            f"torch cannot trace {facts.title}{what} ({first_line(error)}); {remedy}"
        ) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it holds paths of this machine
    return program


TOLERANCE = 1e-4
"""Largest difference of a logit. The kernels are the same; rounding depends on the memory layout."""

FACTS_FILE = "nestify.json"
"""Name of the facts among the archive's extra files."""


def pt2_draft(plain: nn.Module, facts: ExportFacts, batch: int | None) -> Draft:
    """Trace a level; see `capture` for the arguments and errors."""
    program = capture(plain, facts, batch)
    program.example_inputs = None  # each would be stored in the file, with the bytes of an image

    def write(file: BinaryIO) -> None:
        buffer = BytesIO()  # torch's writer ends the process if it cannot write, as on a full disk
        with quiet():
            torch.export.save(program, buffer, extra_files={FACTS_FILE: json.dumps(facts.document())})
        file.write(buffer.getbuffer())

    load_line = partial(_load_line, name=input_name(plain))
    return Draft(write, _reopen, load_line, TOLERANCE, f"torch {torch.__version__}")


def _reopen(path: Path) -> Runner:
    with path.open("rb") as file:
        module = torch.export.load(file).module()

    def run(images: Tensor) -> Outputs:
        outputs: Outputs = module(images)
        return outputs

    return run


def _load_line(path: Path, name: str) -> str:
    return f"torch.export.load({str(path)!r}).module()({name})"
