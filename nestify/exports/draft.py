"""An export before it is kept, and the proof that it computes what the level computes."""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from nestify.errors import NestifyError, OutputError, foreign_code
from nestify.exports.target import ExportFacts
from nestify.model.feature_maps import Outputs, as_list
from nestify.model.spec import synthetic_input

MAX_REASON = 200


@contextmanager
def quiet() -> Iterator[None]:
    """Discard prints, warnings and log lines of the block; exceptions pass through.

    The root logger is afterwards as it was: some of the packages that formats need set its level, or add
    filters or handlers, which would silence or double what the rest of the process logs.
    """
    root, disabled = logging.root, logging.root.manager.disable
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers


def first_line(error: BaseException) -> str:
    """Return the part of an exception's message that fits into a sentence."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().partition("\n")[0].rstrip(" .:!")
    text = text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


Runner = Callable[[Tensor], Any]
"""Images (B, C, H, W) to what a level returns: logits (B, num_classes), an embedding or feature maps."""


FLOAT32_TOLERANCE = 1e-4
"""Largest difference of a logit in float32, relative to the largest logit. Other kernels add in another
order, and batch norm is folded into convolutions."""

FLOAT16_TOLERANCE = 3e-2
"""Largest difference with weights or activations in float16, which keeps about three digits."""


@dataclass(frozen=True)
class Draft:
    """A level in one format, before it is written.

    Attributes:
        write: writes it to a file.
        reopen: loads such a file as a user would, without nestify's own code.
        load_line: returns one line of Python that loads the file at a path.
        tolerance: largest allowed difference of a logit, relative to the largest logit.
        runtime: what runs it when it is loaded again, with the version.
        opset: version of ONNX's operators; None for other formats.
        dtype: type that its weights are stored as.
    """

    write: Callable[[BinaryIO], None]
    reopen: Callable[[Path], Runner]
    load_line: Callable[[Path], str]
    tolerance: float
    runtime: str
    opset: int | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class FolderDraft:
    """A level in a format whose exports are folders, before it is written.

    Attributes:
        fill: writes it into an empty folder.
        reopen: loads such a folder as a user would; None if nothing on this machine can run it.
        compare: if `reopen` is None, returns the largest difference of a stored weight from the level's,
            relative to the largest weight of its tensor.
        load_line: returns one line of Python that loads the folder at a path.
        tolerance: largest allowed difference of a logit or weight.
        runtime: what runs it when it is loaded again, with the version.
        dtype: type that its weights are stored as.
    """

    fill: Callable[[Path], None]
    reopen: Callable[[Path], Runner] | None
    load_line: Callable[[Path], str]
    tolerance: float
    runtime: str
    compare: Callable[[Path], float] | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Probe:
    """Images (B, C, H, W), and what the level returns for them, such as logits (B, num_classes)."""

    images: Tensor
    logits: Outputs


def probes(plain: nn.Module, facts: ExportFacts, batch: int | None) -> list[Probe]:
    """Run the fixed synthetic images through the level, at one batch size or at two if any is allowed.

    None of the sizes is the one that an export is traced with, so a size fixed by tracing is detected.
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
        name: what messages call the export.

    Returns:
        The largest difference of a logit, relative to the largest logit.

    Raises:
        OutputError: if it does not run, or its logits differ.
    """
    try:
        with quiet(), torch.no_grad():
            run = reopen(path)
            found = [run(probe.images) for probe in expected]
    except NestifyError:
        raise
    except Exception as error:  # any exception of a runtime is about the file that was written
        raise OutputError(
            f"{name}: the export does not run when it is loaded again ({first_line(error)}), so it "
            "was not kept; choose another --format or --batch 1"
        ) from error
    off = max(_difference(logits, probe.logits) for logits, probe in zip(found, expected, strict=True))
    if not off <= tolerance:
        raise OutputError(
            f"{name}: the export's logits differ from the level's (by {off:.2g} of the largest, "
            f"allowed is {tolerance:.0e}), so it was not kept; choose another --format"
        )
    return off


def prove_weights(compare: Callable[[Path], float], path: Path, tolerance: float, name: str) -> float:
    """Compare the weights that an export stores with the level's, where nothing can run it.

    Args:
        compare: returns the largest difference of a weight; see `FolderDraft`.
        path: the export.
        tolerance: largest allowed difference.
        name: what messages call the export.

    Returns:
        The largest difference.

    Raises:
        OutputError: if it cannot be read again, or its weights differ.
    """
    with (
        foreign_code(
            lambda reason: OutputError(
                f"{name}: the export cannot be read again ({reason}), so it was not kept"
            )
        ),
        quiet(),
    ):
        off = compare(path)
    if not off <= tolerance:
        raise OutputError(
            f"{name}: the export's weights differ from the level's (by {off:.2g} of the largest, allowed is "
            f"{tolerance:.0e}), so it was not kept; choose another --format or --dtype"
        )
    return off


def _difference(found: Outputs, expected: Outputs) -> float:
    """Return the largest difference, relative to the largest number of the same tensor."""
    pairs = list(zip_longest(as_list(found), as_list(expected)))
    if any(ours is None or theirs is None or ours.shape != theirs.shape for ours, theirs in pairs):
        return float("inf")
    return max(_tensor_difference(ours.double(), theirs.double()) for ours, theirs in pairs)


def _tensor_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
