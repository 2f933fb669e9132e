"""A level as an ONNX model whose sparse layers are packed, from a nested file."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nestify.engine.build import sources_digest
from nestify.engine.library import cache_folder, load_library
from nestify.engine.session import Session, import_runtime
from nestify.errors import OutputError, RecipeError, UnsupportedModelError
from nestify.exports.export import open_level
from nestify.exports.options import check_options
from nestify.exports.target import ExportFacts, ExportFormat, PackedType, Target, choose_target
from nestify.file.measurements import ENGINE
from nestify.file.reader import NestedFile
from nestify.version import __version__

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

    from nestify.exports.draft import Draft, Runner
    from nestify.exports.write import Exported
    from nestify.model.feature_maps import Outputs


def export_sparse(
    path: str | os.PathLike[str],
    level: int | str,
    output: str | os.PathLike[str] | None = None,
    *,
    batch: int | None = None,
    opset: int | None = None,
    dtype: PackedType | str = PackedType.float32,
) -> "Exported":
    """Write one level as an ONNX model with packed layers, checked against the level's logits.

    It runs where ONNX Runtime and the engine's library are; nestify and torch are not needed.

    Args:
        path: a nested file, or its address.
        level: number or name of the level.
        output: an .onnx file; by default next to the nested file.
        batch: number of images per call; by default any number.
        opset: version of ONNX's operators.
        dtype: type in which packed weights are stored, float32 or float16.

    Raises:
        NestifyError: as `nestify.export`; SetupError if the engine's library is missing.
    """
    load_library()
    stored = packed_type(dtype)
    opened = open_level(path, level)
    target = choose_target(opened.source, opened.facts, str(ExportFormat.onnx), output)
    check_options(ExportFormat.onnx, batch, opset)
    return _export(opened.file, opened.number, opened.facts, target, stored, batch, opset)


def packed_type(name: str) -> PackedType:
    """Return the type of packed weights with a name.

    Raises:
        RecipeError: if there is none.
    """
    if name not in list(PackedType):
        raise RecipeError(f"dtype {name!r} of packed weights is not one of {', '.join(PackedType)}")
    return PackedType(name)


def _export(
    file: NestedFile,
    number: int,
    facts: ExportFacts,
    target: Target,
    dtype: PackedType = PackedType.float32,
    batch: int | None = None,
    opset: int | None = None,
) -> "Exported":
    from nestify.exports.onnx import import_packages, translate

    import_packages()  # which names a missing one; what follows only imports them
    from nestify.engine.graph import make_sparse
    from nestify.exports.draft import probes
    from nestify.exports.write import keep
    from nestify.file.loading import load_level

    plain = load_level(file, number)
    expected = probes(plain, facts, batch)
    model = translate(plain, facts, batch, opset)
    packed = sum(choice.is_sparse for choice in make_sparse(model, dtype))
    done = keep(_draft(model, dtype), expected, facts, target, batch)
    return replace(done, packed_layers=packed)


def _pack_traced(
    file: NestedFile, number: int, facts: ExportFacts, target: Target, dtype: PackedType
) -> None:
    """Write a level's packed model from its cached graph, checked against the logits that the file stores.

    Raises:
        UnsupportedModelError: if the graph does not fit the level.
        OutputError: if the logits differ, or the file cannot be written.
    """
    import torch

    from nestify.exports.onnx import import_packages

    import_packages()
    from nestify.engine.graph import make_sparse
    from nestify.engine.traced import fill_constants, traced_level
    from nestify.exports.draft import Probe
    from nestify.exports.write import keep
    from nestify.model.spec import synthetic_input

    model, constants = traced_level(file, number, target.path.parent)
    make_sparse(model, dtype, constants)
    fill_constants(model, constants)
    stored = torch.tensor([file.manifest.levels[number - 1].fingerprint])
    keep(_draft(model, dtype), [Probe(synthetic_input(facts.input_size), stored)], facts, target, None)


def _draft(model: "ModelProto", dtype: PackedType) -> "Draft":
    from nestify.exports.draft import FLOAT16_TOLERANCE, FLOAT32_TOLERANCE
    from nestify.exports.onnx import model_draft

    tolerance = FLOAT16_TOLERANCE if dtype is PackedType.float16 else FLOAT32_TOLERANCE
    return model_draft(model, reopen_packed, packed_load_line, tolerance, str(dtype))


def reopen_packed(path: Path) -> "Runner":
    """Load an ONNX model with packed layers on the engine."""
    import torch

    return as_network(Session(path, torch.get_num_threads()))


def packed_load_line(path: Path) -> str:
    """Return one line of Python that runs the ONNX model with packed layers at a path."""
    return f"nestify.engine.open({str(path)!r})(images)"


def packed_model(
    file: NestedFile,
    number: int,
    cache: str | os.PathLike[str] | None = None,
    dtype: PackedType = PackedType.float32,
) -> Path:
    """Return the path of a level's packed model in a cache folder; it is made if it is not there.

    Its name holds a hash of the level's bytes and of the versions that made it, so that it is never stale.

    Args:
        file: the nested file.
        number: number of the level.
        cache: the folder; None for the user's cache folder.
        dtype: type in which packed weights are stored.

    Raises:
        NestifyError: as `export_sparse`.
    """
    load_library()
    target = cached_target(file, number, [dtype], cache)
    if not target.path.is_file():
        facts = ExportFacts.for_level(file.manifest, number)
        if _has_one_graph(file) and facts.output != "features":  # of which the file stores means alone
            # Where this machine rounds otherwise than the one that wrote the file, torch is asked instead.
            with suppress(UnsupportedModelError, OutputError):
                _pack_traced(file, number, facts, target, dtype)
                return target.path
        _export(file, number, facts, target, dtype)
    return target.path


def cached_target(
    file: NestedFile, number: int, made_with: Sequence[str], cache: str | os.PathLike[str] | None = None
) -> Target:
    """Return where a level's packed model is kept; the cache folder is created.

    Args:
        file: the nested file.
        number: number of the level.
        made_with: what the packed model depends on, apart from the level and this version of nestify.
        cache: the folder; None for the user's cache folder.

    Raises:
        OutputError: if the folder cannot be created.
    """
    folder = cache_folder() / "models" if cache is None else Path(cache)
    entries = file.manifest.levels[:number]
    identity = [number, *(entry.sha256 for entry in entries), file.manifest.model.model_dump_json()]
    made_by = [__version__, sources_digest(), *made_with]
    key = hashlib.sha256(json.dumps([identity, made_by]).encode()).hexdigest()[:20]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be created ({error.strerror or error}); give another folder as cache"
        ) from error
    return Target(folder / f"{key}.onnx", ExportFormat.onnx)


def _has_one_graph(file: NestedFile) -> bool:
    """Return whether all levels of a file are the same network with other weights."""
    manifest = file.manifest
    return not (
        any(level.skipped for level in manifest.levels)
        or any(parameter.axes for parameter in manifest.parameters)
    )


def as_network(session: Session) -> "Runner":
    """Return a session as a network from images (B, C, H, W) to what its level returns, on the CPU."""
    import torch

    def run(images: "Tensor") -> "Outputs":
        found = session(images.detach().numpy())
        if isinstance(found, list):
            return [torch.from_numpy(each) for each in found]
        return torch.from_numpy(found)

    return run


def engine_network(file: NestedFile, level: int) -> "Runner":
    """Return a level of a file on the engine, with as many threads as torch has.

    Args:
        file: the nested file.
        level: number of the level.

    Raises:
        NestifyError: as `export_sparse`.
    """
    import torch

    return as_network(Session(packed_model(file, level), torch.get_num_threads()))


def engine_device(device: str) -> str:
    """Return the device that the engine computes on, if the user's choice allows it.

    Raises:
        RecipeError: if the user chose a different device.
    """
    if device not in ("auto", "cpu"):
        raise RecipeError(f"--engine runs on the CPU, not on --device {device}; leave one of them out")
    return "cpu"


def engine_runtime() -> str:
    """Return what the engine is made of, as far as latencies depend on it."""
    return f"{ENGINE} on onnxruntime {import_runtime().__version__}, {load_library().isa}"
