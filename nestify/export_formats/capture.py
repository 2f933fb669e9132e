"""A model as a graph of ATen operators, which ONNX and pt2 are made from."""

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from nestify.errors import UnsupportedModelError
from nestify.export_formats.facts import ExportFacts
from nestify.export_formats.quiet import first_line, quiet
from nestify.model.spec import synthetic_input

TRACED_BATCH = 2
"""Torch takes a dimension of size 1 for a constant."""


def capture(plain: nn.Module, facts: ExportFacts, batch: int | None) -> ExportedProgram:
    """Trace a model for images of its input size.

    Args:
        plain: in eval mode, on the CPU.
        batch: images per call; None: any number.

    Returns:
        a program without the places in source files that its nodes came from.

    Raises:
        UnsupportedModelError: if torch cannot trace the model.
    """
    images = synthetic_input(facts.input_size, batch or TRACED_BATCH)
    shapes = None if batch else ({0: Dim("batch")},)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(plain, (images,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever tracing raises is about this model
        what, remedy = "", "export it as timm"
        if batch is None:
            what, remedy = " for batches of any size", "try --batch 1, or export it as timm"
        raise UnsupportedModelError(
            f"torch cannot trace {facts.title}{what} ({first_line(error)}); {remedy}"
        ) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # holds the paths of this machine
    return program
