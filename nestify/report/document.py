"""The report of a nested file as data: versioned, and read from the manifest alone. No torch here."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nestify.measurements import Measurement, read_measured
from nestify.nested_file.manifest import LayerEntry, Manifest
from nestify.nested_file.reader import NestedFile, open_nested_file

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LevelReport:
    """One level.

    Attributes:
        level: 1 for the core. `sparsity`: achieved, over the level's maskable weights. `width`,
            `depth`: shares of channels and of blocks. `skipped`: blocks that it leaves out.
        parameters, nonzero_parameters: of the plain model, and without those masked out.
        dense_macs, effective_macs: multiply-accumulates per image that dense kernels execute, and that
            would be left if every zero were skipped at no cost.
        prefix_bytes: bytes of the file that the level needs, header included.
        top1, top5: percent of `images` validation images. `top1_before`: without training.
        classes: how many it tells. `class_set`: their name in the hierarchy; empty for the model's own.
        layers: per maskable weight, (kept, weights, dense MACs, effective MACs).
    """

    level: int
    name: str
    sparsity: float
    width: float
    depth: float
    skipped: list[str]
    pattern: str
    parameters: int
    nonzero_parameters: int
    dense_macs: int | None
    effective_macs: int | None
    prefix_bytes: int
    top1: float | None
    top5: float | None
    loss: float | None
    images: int | None
    top1_before: float | None
    classes: int
    class_set: str
    layers: list[LayerEntry]


@dataclass(frozen=True)
class Report:
    """All levels of one file, core first.

    Attributes:
        original: validation accuracy of the dense model before nesting: top1, top5, loss; may be empty.
        uncounted: operators that the MACs leave out, with how often they ran.
        measured: latencies that `nestify bench` kept beside the file, the oldest first. `measured_problem`:
            why they cannot be shown; empty where nothing is wrong.
    """

    path: str
    architecture: str
    num_classes: int
    input_size: tuple[int, int, int]
    schedule: str
    file_bytes: int
    header_bytes: int
    original: dict[str, float]
    uncounted: dict[str, int]
    levels: list[LevelReport]
    versions: dict[str, str]
    measured: Sequence[Measurement] = ()
    measured_problem: str = ""

    def to_dict(self, *, layers: bool = False) -> dict[str, Any]:
        """Plain JSON values under a schema version; layers only where asked for."""
        document: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        for level, source in zip(document["levels"], self.levels, strict=True):
            level["layers"] = [layer.model_dump() for layer in source.layers]
            if not layers:
                del level["layers"]
        document["measured"] = [measurement.model_dump(mode="json") for measurement in self.measured]
        return document


def read_report(path: str | os.PathLike[str]) -> Report:
    """The report of a nested file, with what was measured of it; needs no data and no torch.

    Raises:
        BadFileError: if it is not a nested file, or a damaged one.
    """
    file = open_nested_file(path)
    measured = read_measured(file)
    return replace(report_of(file), measured=measured.measurements, measured_problem=measured.problem)


def report_of(file: NestedFile) -> Report:
    """The report of an opened nested file, from its manifest alone."""
    manifest = file.manifest
    model = manifest.model
    return Report(
        path=file.name,
        architecture=model.architecture,
        num_classes=model.num_classes,
        input_size=model.preprocessing.input_size,
        schedule=manifest.schedule,
        file_bytes=file.prefix_bytes(file.n_levels),
        header_bytes=file.header_bytes,
        original=dict(manifest.original),
        uncounted=dict(manifest.levels[-1].metrics.uncounted),
        levels=[_level(manifest, k, file.prefix_bytes(k)) for k in range(1, file.n_levels + 1)],
        versions=dict(manifest.versions),
    )


def _level(manifest: Manifest, k: int, prefix_bytes: int) -> LevelReport:
    entry = manifest.levels[k - 1]
    measured = entry.metrics
    return LevelReport(
        level=k,
        name=entry.name,
        sparsity=entry.achieved_sparsity,
        width=entry.width,
        depth=entry.depth,
        skipped=list(entry.skipped),
        pattern=entry.pattern,
        parameters=measured.parameters,
        nonzero_parameters=measured.nonzero_parameters,
        dense_macs=measured.dense_macs,
        effective_macs=measured.effective_macs,
        prefix_bytes=prefix_bytes,
        top1=measured.top1,
        top5=measured.top5,
        loss=measured.loss,
        images=measured.images,
        top1_before=measured.top1_before,
        classes=manifest.num_classes(k),
        class_set=entry.classes,
        layers=list(entry.layers),
    )
