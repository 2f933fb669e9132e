"""An export before it takes its place, and the proof that it is the level."""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from nestify.errors import NestifyError, OutputError
from nestify.exports.target import ExportFacts
from nestify.model.spec import synthetic_input

MAX_REASON = 200


@contextmanager
def quiet() -> Iterator[None]:
    """Drop prints, warnings and log lines of the block; what it raises says enough."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def first_line(error: BaseException) -> str:
    """What an exception says, as far as it fits into a sentence."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().partition("\n")[0].rstrip(" .:!")
    text = text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


Runner = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) to logits (B, num_classes)."""


@dataclass(frozen=True)
class Draft:
    """A level in some format, not yet written.

    Attributes:
        write: put it into a file.
        reopen: load a file again, the way a user would, without nestify's own code.
        load_line: one line of Python that loads the file at this path.
        tolerance: largest allowed difference of a logit, relative to the largest logit.
        opset: of an ONNX model.
    """

    write: Callable[[BinaryIO], None]
    reopen: Callable[[Path], Runner]
    load_line: Callable[[Path], str]
    tolerance: float
    opset: int | None = None


@dataclass(frozen=True)
class Probe:
    """Images (B, C, H, W) with the logits (B, num_classes) that a level gives for them."""

    images: Tensor
    logits: Tensor


def probes(plain: nn.Module, facts: ExportFacts, batch: int | None) -> list[Probe]:
    """The fixed synthetic images through the level: at `batch`, or at two sizes where any is allowed.

    No size is the one that an export is traced with, so that a size that was written into it shows.
    """
    sizes = [batch] if batch else [1, 3]
    with torch.no_grad():
        return [
            Probe(images, plain(images))
            for images in (synthetic_input(facts.input_size, size) for size in sizes)
        ]


def prove(
    reopen: Callable[[Path], Runner], path: Path, expected: Sequence[Probe], tolerance: float, name: str
) -> float:
    """Load an export again and compare it with the level.

    Args:
        name: of the export in messages.

    Returns:
        the largest difference of a logit, relative to the largest logit.

    Raises:
        OutputError: if it does not run, or gives other logits.
    """
    try:
        with quiet(), torch.no_grad():
            run = reopen(path)
            found = [run(probe.images) for probe in expected]
    except NestifyError:
        raise
    except Exception as error:  # whatever a runtime raises is about the file that was written
        raise OutputError(
            f"{name}: what was written does not run when it is loaded again ({first_line(error)}), so it "
            "was not kept; choose another --format or --batch 1"
        ) from error
    off = max(_difference(logits, probe.logits) for logits, probe in zip(found, expected, strict=True))
    if not off <= tolerance:
        raise OutputError(
            f"{name}: what was written gives other logits than the level (off by {off:.2g} of the largest, "
            f"allowed is {tolerance:.0e}), so it was not kept; choose another --format"
        )
    return off


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
