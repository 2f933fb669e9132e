"""A level as an ExecuTorch program for phones, whose operators XNNPACK runs."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor, nn

from nestify.errors import UnsupportedModelError, foreign_code
from nestify.exports.draft import FLOAT32_TOLERANCE, Draft, Runner, quiet
from nestify.exports.packages import import_package
from nestify.exports.picture_input import input_name
from nestify.exports.pt2 import capture
from nestify.exports.target import ExportFacts

LARGEST_BATCH = 64
"""Largest number of images per call; a program reserves its memory for the largest when it is made."""

LARGEST_SIDE = 2048
"""Largest height and width of pictures in pixels, for the same reason; it takes about 100 MB per picture."""


def executorch_draft(plain: nn.Module, facts: ExportFacts, batch: int | None) -> Draft:
    """Translate a level to ExecuTorch, in float32.

    Args:
        plain: the level, in eval mode on the CPU, or with its preprocessing as a `PictureInput`.
        facts: what the export states about itself.
        batch: number of images per call; None for any number up to `LARGEST_BATCH`.

    Raises:
        RecipeError: if the package is missing.
        UnsupportedModelError: if torch cannot trace the model, or ExecuTorch cannot translate it.
    """
    exir, xnnpack = _module("exir"), _module("backends.xnnpack.partition.xnnpack_partitioner")
    program = capture(plain, facts, batch, None if batch else LARGEST_BATCH, LARGEST_SIDE)

    def refusal(reason: str) -> UnsupportedModelError:
        fixed = "" if batch else "try --batch 1, or "
        return UnsupportedModelError(
            f"ExecuTorch cannot translate {facts.title} ({reason}); {fixed}export it as onnx"
        )

    with foreign_code(refusal), quiet():
        lowered = exir.to_edge_transform_and_lower(
            program,
            partitioner=[xnnpack.XnnpackPartitioner()],
            constant_methods={f"nestify_{key}": value for key, value in facts.metadata().items()},
        )
        done = lowered.to_executorch()

    def write(file: BinaryIO) -> None:
        done.write_to_file(file)

    version = _module("version").__version__
    load_line = partial(_load_line, name=input_name(plain))
    return Draft(write, _reopen, load_line, FLOAT32_TOLERANCE, f"executorch {version}")


def _module(name: str) -> Any:
    return import_package(f"executorch.{name}", "executorch", "executorch", "about 200 MB")


def _reopen(path: Path) -> Runner:
    with _no_native_log():
        method = _module("runtime").Runtime.get().load_program(path).load_method("forward")

    def run(images: Tensor) -> Tensor:
        logits: Tensor = method.execute([images])[0]
        return logits.clone()  # the method's own memory, which its next call overwrites

    return run


@contextmanager
def _no_native_log() -> Iterator[None]:
    """Discard what the runtime's native code prints about the processor when it is loaded."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _load_line(path: Path, name: str) -> str:
    return f"Runtime.get().load_program({str(path)!r}).load_method('forward').execute([{name}])[0]"
