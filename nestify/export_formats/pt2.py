"""A level as a program of `torch.export`, which torch alone loads."""

import json
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from nestify.export_formats.capture import capture
from nestify.export_formats.draft import Draft, Runner
from nestify.export_formats.facts import ExportFacts
from nestify.export_formats.quiet import quiet

TOLERANCE = 1e-4
"""The same kernels in the same order: what differs is rounding where memory lies differently."""

FACTS_FILE = "nestify.json"
"""Name of the facts among the archive's extra files."""


def pt2_draft(plain: nn.Module, facts: ExportFacts, batch: int | None) -> Draft:
    """Trace a level; see `capture` for the arguments and what is raised."""
    program = capture(plain, facts, batch)
    program.example_inputs = None  # they would lie in the file, a picture's worth of bytes each

    def write(file: BinaryIO) -> None:
        with quiet():
            torch.export.save(program, file, extra_files={FACTS_FILE: json.dumps(facts.document())})

    return Draft(write, _reopen, _load_line, TOLERANCE)


def _reopen(path: Path) -> Runner:
    with path.open("rb") as file:
        module = torch.export.load(file).module()

    def run(images: Tensor) -> Tensor:
        logits: Tensor = module(images)
        return logits

    return run


def _load_line(path: Path) -> str:
    return f"torch.export.load({str(path)!r}).module()(images)"
