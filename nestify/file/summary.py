"""The report of a nested file as versioned data, read from the manifest alone. Does not import torch."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nestify.errors import BadFileError
from nestify.file.layout import Slot, name_parts
from nestify.file.manifest import ClassMap, Label, LayerEntry
from nestify.file.measurements import Measurement, read_measured
from nestify.file.reader import NestedFile, open_nested_file
from nestify.file.untrusted import strict_json
from nestify.files import is_special
from nestify.recipe.amounts import Limited
from nestify.recipe.metric import Metric, metric_of
from nestify.shown import Shown

SCHEMA_VERSION = 1

_OPTIONAL = {"agreement", "agreement_before", "cosine", "cosine_before", "map", "map_before"}


@dataclass(frozen=True)
class ChunkBytes:
    """Bytes of a level's own chunk, by content; 0 if a stored report does not have them.

    Attributes:
        values: bytes of the shared weights that enter at the level.
        positions: bytes of their positions.
        private: bytes of the level's private tensors.
        padding: bytes between tensors.
    """

    values: int = 0
    positions: int = 0
    private: int = 0
    padding: int = 0

    @property
    def total(self) -> int:
        """Total bytes of the chunk."""
        return self.values + self.positions + self.private + self.padding


@dataclass(frozen=True)
class ClassSet:
    """Coarser classes than the model's own.

    Attributes:
        name: name of this set of classes.
        class_names: names of the coarse classes, by index.
        parents: the coarse class of each of the model's classes.
    """

    name: str
    class_names: list[str]
    parents: list[int]


@dataclass(frozen=True)
class LevelReport:
    """One level of a report.

    Attributes:
        level: number of the level, 1 for the core level.
        name: name of the level.
        sparsity: achieved share of the level's maskable weights that are zero.
        width: share of the channels.
        depth: share of the blocks.
        skipped: names of the blocks that it skips.
        parameters: number of parameters of the plain model.
        nonzero_parameters: number of parameters that are not masked out.
        dense_macs: multiply-accumulates per image that dense kernels execute.
        effective_macs: multiply-accumulates per image if every zero were skipped at no cost.
        prefix_bytes: bytes of the file that the level needs, header included.
        top1: top-1 accuracy in percent on the validation images.
        top5: top-5 accuracy in percent on the validation images.
        top1_before: top-1 accuracy without training.
        agreement: agreement with the original model in percent; None for levels learned with labels.
        cosine: mean cosine similarity of its logits and the original model's, as for `agreement`.
        agreement_before: agreement without training.
        cosine_before: cosine similarity without training, of a backbone.
        map: mean average precision in percent, of levels that learned several labels per image.
        map_before: mean average precision without training.
        images: number of validation images.
        classes: number of classes that it predicts.
        class_set: name of its classes in the hierarchy; empty for the model's own.
        layers: per maskable weight, (kept, weights, dense MACs, effective MACs).
        temperature: fitted temperature; None if not fitted.
        consensus: fitted consensus weights; empty if not fitted.
        chunk: bytes that the level adds to the file.
        tensors: bytes of the chunk by tensor, without padding.
        feature_channels: channels of each feature map of a backbone, or the length of its embedding; empty
            for a classifier.
    """

    level: int
    name: Label
    sparsity: float
    width: float
    depth: float
    skipped: list[str]
    pattern: Label
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
    class_set: Label
    layers: list[LayerEntry]
    temperature: float | None = None
    consensus: list[float] = field(default_factory=list)
    chunk: ChunkBytes = ChunkBytes()
    tensors: dict[str, int] = field(default_factory=dict)
    agreement: float | None = None
    cosine: float | None = None
    agreement_before: float | None = None
    cosine_before: float | None = None
    map: float | None = None
    map_before: float | None = None
    feature_channels: list[int] = field(default_factory=list)

    @property
    def score(self) -> float | None:
        """What it is judged by, in percent; None if it was not evaluated."""
        return metric_of(self).score(self)

    @property
    def limited(self) -> dict[Limited, float | None]:
        """Return its values of everything that can be limited without measuring."""
        return {
            "bytes": self.prefix_bytes,
            "macs": self.dense_macs,
            "params": self.nonzero_parameters,
            "top1": self.top1,
        }


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """All levels of one file, core first.

    Attributes:
        original: validation accuracy of the dense model before nesting: top1, top5, loss; may be empty.
        uncounted: operators that the MACs leave out, with their number of calls.
        class_names: names of the model's own classes; None if the file has none.
        hierarchy: coarser classes that levels predict.
        recipe: all options that the file was made with.
        seed: seed of the run; None if a stored report does not have it.
        source_sha256: SHA-256 of the checkpoint file that it was made from; None if there was none.
        measured: latencies that `nestify bench` saved next to the file, oldest first.
        measured_problem: why they cannot be shown; empty if nothing is wrong.
        extensions: the runs that added levels to the file (`nestify extend`), by the name of the first level
            that each added; the other attributes are about the run before them.
    """

    path: Label
    architecture: Label
    num_classes: int
    input_size: tuple[int, int, int]
    schedule: Label
    file_bytes: int
    header_bytes: int
    original: dict[str, float]
    uncounted: dict[Label, int]
    levels: list[LevelReport]
    versions: dict[Label, Label]
    class_names: list[str] | None = None
    hierarchy: list[ClassSet] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    source_sha256: str | None = None
    measured: Sequence[Measurement] = ()
    measured_problem: str = ""
    extensions: dict[Label, dict[str, Any]] = field(default_factory=dict)

    @property
    def metric(self) -> Metric:
        """What the levels are judged by."""
        return metric_of(next((level for level in self.levels if level.score is not None), self.levels[0]))

    @property
    def added_levels(self) -> list[str]:
        """Names of the levels that later runs added."""
        names = [level.name for level in self.levels]
        return names[next((k for k, name in enumerate(names) if name in self.extensions), len(names)) :]

    def to_dict(self, *, layers: bool = False) -> dict[str, Any]:
        """Return plain JSON values with a schema version; layers and tensors only if requested."""
        document: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        for level, source in zip(document["levels"], self.levels, strict=True):
            level["layers"] = [layer.model_dump() for layer in source.layers]
            if not layers:
                del level["layers"], level["tensors"]
            for key in [key for key in (*_OPTIONAL, "feature_channels") if level[key] in (None, [])]:
                del level[key]
        document["measured"] = [measurement.model_dump(mode="json") for measurement in self.measured]
        if not self.extensions:
            del document["extensions"]
        return document


def read_report(path: str | os.PathLike[str]) -> Report:
    """Read the report of a nested file, with its saved measurements; needs no data and no torch.

    Raises:
        BadFileError: if it is not a nested file, or damaged.
    """
    file = open_nested_file(path)
    measured = read_measured(file)
    return replace(make_report(file), measured=measured.measurements, measured_problem=measured.problem)


def make_report(file: NestedFile) -> Report:
    """Make the report of an open nested file from its manifest alone."""
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
        levels=[_level(file, k) for k in range(1, file.n_levels + 1)],
        versions=dict(manifest.versions),
        class_names=model.class_names,
        hierarchy=[_class_set(classes) for classes in manifest.hierarchy],
        recipe=dict(manifest.recipe),
        seed=manifest.seed,
        source_sha256=manifest.source_sha256,
        extensions={
            level.name: level.extension.model_dump(mode="json")
            for level in manifest.levels
            if level.extension is not None
        },
    )


def _level(file: NestedFile, k: int) -> LevelReport:
    entry = file.manifest.levels[k - 1]
    measured = entry.metrics
    slots = file.layout.chunks[k - 1]
    return LevelReport(
        level=k,
        name=entry.name,
        sparsity=entry.achieved_sparsity,
        width=entry.width,
        depth=entry.depth,
        skipped=list(entry.skipped),
        pattern=entry.pattern,
        prefix_bytes=file.prefix_bytes(k),
        classes=file.manifest.num_classes(k),
        class_set=entry.classes,
        temperature=entry.temperature,
        consensus=list(entry.consensus),
        chunk=_chunk_bytes(slots),
        layers=list(entry.layers),
        tensors=_tensor_bytes(slots),
        feature_channels=list(entry.feature_channels),
        **{name: value for name, value in measured if name != "uncounted"},
    )


def _class_set(classes: ClassMap) -> ClassSet:
    return ClassSet(classes.name, list(classes.class_names), list(classes.parents))


def _chunk_bytes(slots: Sequence[Slot]) -> ChunkBytes:
    held: Counter[str] = Counter()
    for slot in slots:
        kind, _ = name_parts(slot.spec.name)
        held[kind] += slot.spec.nbytes
    return ChunkBytes(held["values"], held["entry"], held["private"], held["pad"])


def _tensor_bytes(slots: Sequence[Slot]) -> dict[str, int]:
    held: Counter[str] = Counter()
    for slot in slots:
        kind, tensor = name_parts(slot.spec.name)
        if kind != "pad":
            held[tensor] += slot.spec.nbytes
    return dict(held)


MAX_BYTES = 2**26


def open_report(path: str | os.PathLike[str]) -> Report:
    """Read the report of a nested file, or one that `report --json` printed, from a path ending in `.json`.

    Raises:
        BadFileError: if it is neither, or damaged.
    """
    if not os.fspath(path).endswith(".json"):
        return read_report(path)
    document = _read(Path(path))
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise BadFileError(
            f"{path}: this is not a report of schema version {SCHEMA_VERSION}; write one with "
            "nestify report FILE --json"
        )
    levels = [{"layers": [], **level} for level in _tables(document.get("levels"))]
    place = "levels"
    try:
        report = TypeAdapter(Report).validate_python({**document, "levels": levels})
        if report.levels:
            return report
    except ValidationError as error:
        place = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
    raise BadFileError(f"{path}: {place} is not valid in a report; write it with nestify report FILE --json")


def _read(path: Path) -> Any:
    if is_special(path):
        raise BadFileError(f"{path}: is not a regular file; give a nested file, or a report in JSON")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadFileError(f"{path}: this is larger than a report can be ({MAX_BYTES >> 20} MiB)")
        return strict_json(path.read_bytes().decode())
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise BadFileError(
            f"{path}: this is not JSON; give a nested file, or what nestify report --json printed"
        ) from error


def _tables(levels: object) -> list[dict[str, Any]]:
    rows = levels if isinstance(levels, list) else []
    return [row if isinstance(row, dict) else {} for row in rows]
