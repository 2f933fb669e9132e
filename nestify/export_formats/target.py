"""Where an export goes, and in which format. No torch here."""

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from nestify.errors import OutputError, RecipeError

if TYPE_CHECKING:  # `nestify --help` imports this module, and the manifest takes long to import
    from nestify.export_formats.facts import ExportFacts

NESTED_SUFFIXES = (".safetensors", ".nested")


class Format(StrEnum):
    """What an export is: weights for timm, an ONNX model, a program of `torch.export`."""

    timm = "timm"
    onnx = "onnx"
    pt2 = "pt2"

    @property
    def suffix(self) -> str:
        """With which its files end; timm and others tell a format by it."""
        return ".safetensors" if self is Format.timm else f".{self.value}"


@dataclass(frozen=True)
class Target:
    """A place for an export.

    Attributes:
        folder: whether `path` is to be a folder that timm loads as `local-dir:`.
    """

    path: Path
    format: Format
    folder: bool = False


def choose_target(
    source: Path,
    facts: "ExportFacts",
    format: str | None = None,
    output: str | os.PathLike[str] | None = None,
) -> Target:
    """Find format and place from what the user said of either.

    Args:
        source: the nested file.
        format: timm, onnx or pt2; None: by the suffix of `output`.
        output: a file, or for timm a folder (it exists, or ends with a slash); None: beside the nested
            file, as in `digits.level1.onnx`.

    Raises:
        RecipeError: if the format is unknown, or not said.
        OutputError: if an export has no place there.
    """
    if output is None:
        if format is None:
            raise RecipeError("the format of the export is not given; add --format timm, onnx or pt2")
        chosen = _format(format)
        return Target(_beside(source, facts, chosen), chosen)
    try:
        return _place(source, format, output)
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be looked up ({error.strerror or error}); choose another path"
        ) from error


def check_options(format: Format, batch: int | None, opset: int | None) -> None:
    """Refuse options that a format does not have.

    Raises:
        RecipeError: naming the option.
    """
    if opset is not None and format is not Format.onnx:
        raise RecipeError(f"--opset {opset} goes with --format onnx, not with {format}; leave it out")
    if batch is not None and format is Format.timm:
        raise RecipeError(f"--batch {batch} does not go with --format timm, which takes any; leave it out")
    if batch is not None and batch < 1:
        raise RecipeError(f"--batch {batch} is no number of images; give 1 or more, or leave it out for any")


def _place(source: Path, format: str | None, output: str | os.PathLike[str]) -> Target:
    """What the user's path is; an OSError where the system does not say."""
    path = Path(output)
    if path.is_dir() or os.fspath(output).endswith(("/", os.sep)):
        return _folder(path, _format(format or Format.timm))
    chosen = _format(format) if format else _guess(path)
    if path.suffix.lower() != chosen.suffix:
        raise OutputError(f"{path}: does not end with {chosen.suffix}; --format {chosen} writes such files")
    if path.exists() and source.exists() and path.samefile(source):
        raise OutputError(f"{path}: is the nested file itself; choose another path")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: its folder does not exist; make it, or choose another path")
    return Target(path, chosen)


def _format(name: str) -> Format:
    if name not in list(Format):
        raise RecipeError(f"format {name!r} is not one of {', '.join(Format)}")
    return Format(name)


def _guess(path: Path) -> Format:
    for format in Format:
        if path.suffix.lower() == format.suffix:
            return format
    suffixes = ", ".join(format.suffix for format in Format)
    raise RecipeError(f"{path}: does not end with one of {suffixes}; add --format timm, onnx or pt2")


def _folder(path: Path, format: Format) -> Target:
    if format is not Format.timm:
        raise OutputError(f"{path}: is a folder; give the path of a {format.suffix} file in it")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path}: is not an empty folder; give a new one, or a .safetensors file in it")
    return Target(path, format, folder=True)


def _beside(source: Path, facts: "ExportFacts", format: Format) -> Path:
    name = source.name
    for suffix in NESTED_SUFFIXES:
        name = name.removesuffix(suffix)
    # A name from a file that nobody vouches for must not lead into another folder.
    plain = re.fullmatch(r"\w[\w.-]{0,63}", facts.level_name)
    level = facts.level_name if plain else f"level{facts.level}"
    return source.with_name(f"{name}.{level}{format.suffix}")
