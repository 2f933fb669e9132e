"""Path and format of an export. Does not import torch."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from nestify.errors import OutputError, RecipeError
from nestify.file.manifest import Manifest
from nestify.files import check_apart
from nestify.model.outputs import OutputKind, output_kind
from nestify.version import __version__


@dataclass(frozen=True)
class ExportFacts:
    """What the manifest of a nested file says about one level.

    Attributes:
        architecture: name of the timm model.
        kwargs: arguments for `timm.create_model(architecture, **kwargs)`.
        num_classes: number of classes that the level predicts.
        class_names: class names in the order of the logits; None if the file has none.
        preprocessing: timm's data configuration: input_size (C, H, W), mean, std (per channel, for pixels
            in [0, 1]), interpolation, crop_pct, crop_mode.
        level: number of the level, 1 for the core level.
        level_name: name of the level.
        sparsity: share of the maskable weights that are zero, in [0, 1].
        metrics: accuracies and costs of the level, by name.
        feature_channels: channels of each feature map of a backbone, or the length of its embedding; empty
            for a classifier.
        feature_reductions: pixels of the image per position of each feature map; empty without them.
        channels_last: whether feature maps are (B, H, W, C) and not (B, C, H, W).
        level_sha256: SHA-256 of the level's own bytes in the nested file; None if it is in none.
        source_sha256: SHA-256 of the checkpoint that the nested file was made from; None without one.
    """

    architecture: str
    kwargs: Mapping[str, Any]
    num_classes: int
    class_names: Sequence[str] | None
    preprocessing: Mapping[str, Any]
    level: int
    level_name: str
    sparsity: float
    metrics: Mapping[str, Any]
    feature_channels: Sequence[int] = ()
    feature_reductions: Sequence[int] = ()
    channels_last: bool = False
    level_sha256: str | None = None
    source_sha256: str | None = None

    @classmethod
    def for_level(cls, manifest: Manifest, level: int) -> "ExportFacts":
        """Return the facts of a level, given by its number."""
        model, entry, classes = manifest.model, manifest.levels[level - 1], manifest.num_classes(level)
        return cls(
            architecture=model.architecture,
            kwargs=model.kwargs if classes == model.num_classes else {**model.kwargs, "num_classes": classes},
            num_classes=classes,
            class_names=manifest.class_names(level),
            preprocessing=model.preprocessing.model_dump(mode="json"),
            level=level,
            level_name=entry.name,
            sparsity=entry.achieved_sparsity,
            metrics=entry.metrics.model_dump(mode="json", exclude_none=True),
            feature_channels=tuple(entry.feature_channels),
            feature_reductions=tuple(model.feature_reductions),
            channels_last=model.channels_last,
            level_sha256=entry.sha256,
            source_sha256=manifest.source_sha256,
        )

    @property
    def output(self) -> OutputKind:
        """What the level returns."""
        return output_kind(self.kwargs, self.num_classes)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Return (channels, height, width) of one image, in pixels."""
        channels, height, width = self.preprocessing["input_size"]
        return int(channels), int(height), int(width)

    @property
    def title(self) -> str:
        """Return what messages call the level; control characters in its name are escaped."""
        name = self.level_name if self.level_name.isprintable() else repr(self.level_name)
        return f"level {self.level} ({name}) of {self.architecture}"

    def document(self) -> dict[str, Any]:
        """Return the facts as one JSON object."""
        optional = {
            "feature_channels": list(self.feature_channels),
            "feature_reductions": list(self.feature_reductions),
            "channels_last": self.channels_last,
            "level_sha256": self.level_sha256,
            "source_sha256": self.source_sha256,
        }
        return {
            "architecture": self.architecture,
            "kwargs": dict(self.kwargs),
            "num_classes": self.num_classes,
            "classes": None if self.class_names is None else list(self.class_names),
            "preprocessing": dict(self.preprocessing),
            "level": self.level,
            "level_name": self.level_name,
            "sparsity": self.sparsity,
            "metrics": dict(self.metrics),
            **{key: value for key, value in optional.items() if value},
            "producer": f"nestify {__version__}",
        }

    def metadata(self) -> dict[str, str]:
        """Return the facts for formats that hold only strings; other values become JSON."""
        known = {key: value for key, value in self.document().items() if value is not None}
        return {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in known.items()
        }


NESTED_SUFFIXES = (".safetensors", ".nested")


class ExportFormat(StrEnum):
    """Format of an export, named after what loads it."""

    timm = "timm"
    onnx = "onnx"
    pt2 = "pt2"
    openvino = "openvino"
    coreml = "coreml"
    executorch = "executorch"

    @property
    def suffix(self) -> str:
        """Suffix of its file or folder, by which other programs recognise most of the formats."""
        return _SUFFIXES.get(self, f".{self.value}")

    @property
    def is_folder(self) -> bool:
        """Whether an export in this format is always a folder."""
        return self in (ExportFormat.openvino, ExportFormat.coreml)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The types that weights can be stored as, the default first."""
        return _DTYPES.get(self, ("float32",))


_SUFFIXES = {
    ExportFormat.timm: ".safetensors",
    ExportFormat.coreml: ".mlpackage",
    ExportFormat.executorch: ".pte",
}

_DTYPES = {
    ExportFormat.openvino: ("float32", "float16"),
    ExportFormat.coreml: ("float16", "float32", "int8"),
}


INT8_PATTERN = "1x4"
"""Pattern of the levels that the sparse engine packs in int8: groups of four input channels."""


class PackedType(StrEnum):
    """Type in which the weights of packed layers are stored; the kernels compute in float32."""

    float32 = "float32"
    float16 = "float16"


@dataclass(frozen=True)
class Target:
    """Path and format of an export.

    Attributes:
        path: file or folder to write.
        format: format of the export.
        folder: whether `path` is a folder: for timm, one that it loads as `local-dir:`.
    """

    path: Path
    format: ExportFormat
    folder: bool = False


def choose_target(
    source: Path,
    facts: "ExportFacts",
    format: str | None = None,
    output: str | os.PathLike[str] | None = None,
    mark: str = "",
) -> Target:
    """Choose the format and the path of an export from what the user gave.

    Args:
        source: the nested file.
        facts: the level to export.
        format: name of the format; None to use the suffix of `output`.
        output: a file, or a new folder for coreml and openvino, and for timm if it ends with a slash or
            exists; None for a path next to the nested file, such as `digits.level1.onnx`.
        mark: what the name of a file next to the nested file says besides, such as `int8`.

    Raises:
        RecipeError: if the format is unknown, or not given.
        OutputError: if nothing can be written there.
    """
    if output is None:
        if format is None:
            raise RecipeError(f"the format of the export is not given; add --format {_ANY_FORMAT}")
        chosen = _format(format)
        path = _beside(source, facts, chosen, mark)
        return _folder(path, chosen) if chosen.is_folder else Target(path, chosen)
    try:
        return _place(source, format, output)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{output}: cannot be accessed ({getattr(error, 'strerror', None) or error}); choose another path"
        ) from error


def _place(source: Path, format: str | None, output: str | os.PathLike[str]) -> Target:
    """Describe the user's path; raises OSError or ValueError if the system cannot."""
    path = Path(output)
    with suppress(FileNotFoundError):
        os.stat(path)  # ValueError for a NUL, which the methods of Path hide
    if path.is_dir() or os.fspath(output).endswith(("/", os.sep)):
        named = next((each for each in ExportFormat if each.is_folder and _has_suffix(path, each)), "timm")
        return _folder(path, _format(format or named))
    chosen = _format(format) if format else _guess(path)
    if not _has_suffix(path, chosen):
        raise OutputError(f"{path}: does not end with {chosen.suffix}; --format {chosen} writes such files")
    check_apart(path, {"the nested file itself": source if source.exists() else None})
    if not path.parent.is_dir():
        raise OutputError(f"{path}: its folder does not exist; create it, or choose another path")
    return _folder(path, chosen) if chosen.is_folder else Target(path, chosen)


_ANY_FORMAT = ", ".join(list(ExportFormat)[:-1]) + f" or {list(ExportFormat)[-1]}"


def _has_suffix(path: Path, format: ExportFormat) -> bool:
    return path.suffix.lower() == format.suffix


def _format(name: str) -> ExportFormat:
    if name not in list(ExportFormat):
        raise RecipeError(f"format {name!r} is not one of {', '.join(ExportFormat)}")
    return ExportFormat(name)


def _guess(path: Path) -> ExportFormat:
    for format in ExportFormat:
        if _has_suffix(path, format):
            return format
    if path.suffix.lower() == ".tflite":
        raise RecipeError(
            f"{path}: LiteRT's converter needs an environment of its own; export with --format pt2 --batch 1 "
            "and convert that, as nestify guide shipping shows"
        )
    suffixes = ", ".join(format.suffix for format in ExportFormat)
    raise RecipeError(f"{path}: does not end with one of {suffixes}; add --format {_ANY_FORMAT}")


def _folder(path: Path, format: ExportFormat) -> Target:
    if not format.is_folder and format is not ExportFormat.timm:
        raise OutputError(f"{path}: is a folder; give the path of a {format.suffix} file in it")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        in_it = "" if format.is_folder else f", or a {format.suffix} file in it"
        raise OutputError(f"{path}: is not an empty folder; give a new one{in_it}")
    if format is ExportFormat.coreml and not _has_suffix(path, format):
        raise OutputError(f"{path}: does not end with {format.suffix}; --format {format} writes such folders")
    return Target(path, format, folder=True)


def _beside(source: Path, facts: "ExportFacts", format: ExportFormat, mark: str) -> Path:
    name = source.name
    for suffix in NESTED_SUFFIXES:
        name = name.removesuffix(suffix)
    # A name from an untrusted file must not lead into another folder.
    plain = re.fullmatch(r"\w[\w.-]{0,63}", facts.level_name)
    level = facts.level_name if plain else f"level{facts.level}"
    if format is ExportFormat.timm:
        mark = "timm"  # without it, the name would be that of the level's slice
    return source.with_name(f"{name}.{level}{mark and f'.{mark}'}{format.suffix}")
