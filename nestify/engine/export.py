"""A level as an ONNX model whose sparse layers are packed, from a nested file."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from nestify.engine.build import sources_digest
from nestify.engine.library import cache_folder, load_library
from nestify.engine.session import Session, import_runtime
from nestify.errors import OutputError, RecipeError
from nestify.exports.target import ExportFacts, ExportFormat, Target, check_options, choose_target
from nestify.file.measurements import ENGINE
from nestify.file.reader import NestedFile, open_nested_file
from nestify.file.source import LocalFile
from nestify.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from nestify.exports.draft import Runner
    from nestify.exports.write import Exported


def export_sparse(
    path: str | os.PathLike[str],
    level: int | str,
    output: str | os.PathLike[str] | None = None,
    *,
    batch: int | None = None,
    opset: int | None = None,
) -> "Exported":
    """Write one level as an ONNX model with packed layers, checked against the level's logits.

    It runs where ONNX Runtime and the engine's library are; nestify and torch are not needed.

    Args:
        path: a nested file, or its address.
        level: number or name of the level.
        output: an .onnx file; by default next to the nested file.
        batch: number of images per call; by default any number.
        opset: version of ONNX's operators.

    Raises:
        NestifyError: as `nestify.export`; SetupError if the engine's library is missing.
    """
    load_library()
    file = open_nested_file(path, truncated=True)
    file.check_whole(number := file.level_index(str(level)))
    facts = ExportFacts.for_level(file.manifest, number)
    source = Path(file.name) if isinstance(file.source, LocalFile) else Path(PurePosixPath(file.name).name)
    format = ExportFormat.onnx
    target = choose_target(source, facts, str(format), output)
    check_options(format, batch, opset)
    return _export(file, number, facts, target, batch, opset)


def _export(
    file: NestedFile, number: int, facts: ExportFacts, target: Target, batch: int | None, opset: int | None
) -> "Exported":
    from nestify.engine.graph import make_sparse
    from nestify.exports.draft import probes
    from nestify.exports.onnx import model_draft, translate
    from nestify.exports.write import keep
    from nestify.file.loading import load_level

    plain = load_level(file, number)
    expected = probes(plain, facts, batch)
    model = translate(plain, facts, batch, opset)
    packed = sum(choice.is_sparse for choice in make_sparse(model))
    done = keep(model_draft(model, reopen_packed, packed_load_line), expected, facts, target, batch)
    return replace(done, packed_layers=packed)


def reopen_packed(path: Path) -> "Runner":
    """Load an ONNX model with packed layers on the engine."""
    import torch

    return as_network(Session(path, torch.get_num_threads()))


def packed_load_line(path: Path) -> str:
    """Return one line of Python that runs the ONNX model with packed layers at a path."""
    return f"nestify.engine.open({str(path)!r})(images)"


def packed_model(file: NestedFile, number: int, cache: str | os.PathLike[str] | None = None) -> Path:
    """Return the path of a level's packed model in a cache folder; it is made if it is not there.

    Its name holds a hash of the level's bytes and of the versions that made it, so that it is never stale.

    Args:
        file: the nested file.
        number: number of the level.
        cache: the folder; None for the user's cache folder.

    Raises:
        NestifyError: as `export_sparse`.
    """
    load_library()
    folder = cache_folder() / "models" if cache is None else Path(cache)
    entries = file.manifest.levels[:number]
    identity = [number, *(entry.sha256 for entry in entries), file.manifest.model.model_dump_json()]
    made_by = [__version__, sources_digest()]
    key = hashlib.sha256(json.dumps([identity, made_by]).encode()).hexdigest()[:20]
    target = Target(folder / f"{key}.onnx", ExportFormat.onnx)
    if not target.path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be created ({error.strerror or error}); give another folder as cache"
            ) from error
        _export(file, number, ExportFacts.for_level(file.manifest, number), target, None, None)
    return target.path


def as_network(session: Session) -> "Runner":
    """Return a session as a network from images (B, C, H, W) to logits (B, classes), tensors on the CPU."""
    import torch

    def run(images: "Tensor") -> "Tensor":
        return torch.from_numpy(session(images.detach().numpy()))

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
        RecipeError: if the user chose another one.
    """
    if device not in ("auto", "cpu"):
        raise RecipeError(f"--engine runs on the CPU, not on --device {device}; leave one of them out")
    return "cpu"


def engine_runtime() -> str:
    """Return what the engine is made of, as far as latencies depend on it."""
    return f"{ENGINE} on onnxruntime {import_runtime().__version__}, {load_library().isa}"
