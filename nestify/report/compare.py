"""Comparison of two reports, level by level and layer by layer. No torch here."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nestify.file.summary import LevelReport, Report
from nestify.recipe.metric import METRICS, metric_of
from nestify.report.sheet import Column, Sheet, settings
from nestify.report.table import mebibytes, number, quantity
from nestify.shown import Shown

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LevelPair:
    """The levels with the same name in two files.

    Attributes:
        name: name of the level.
        here: the level in this file; None if it has no such level.
        there: the level in the other file; None if it has no such level.
    """

    name: str
    here: LevelReport | None
    there: LevelReport | None


@dataclass(frozen=True)
class LayerChange:
    """The densities of one weight tensor in two files.

    Attributes:
        name: name of the weight tensor.
        here: share of the tensor that each level of this file keeps, by the level's name; None for a level
            that has none of the tensor. Empty if this file lacks the tensor.
        there: shares that each level of the other file keeps, likewise.
    """

    name: str
    here: dict[str, float | None]
    there: dict[str, float | None]


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Comparison of a file with another file.

    Attributes:
        here: report of this file.
        there: report of the other file, from which changes are counted.
        levels: core first; levels that only the other file has come last.
        layers: weight tensors whose density differs at a level of both files, or that one file lacks.
        options: options in which the recipes differ, as (key, here, there); None if a recipe lacks the key.
        layer_count: number of weight tensors in either file; None if a report does not list its layers.
    """

    here: Report
    there: Report
    levels: Sequence[LevelPair]
    layers: Sequence[LayerChange]
    options: Sequence[tuple[str, str | None, str | None]]
    layer_count: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values with a schema version: both values of each quantity, and the change."""
        return {
            "schema_version": SCHEMA_VERSION,
            "file": self.here.path,
            "other": self.there.path,
            "levels": [
                {
                    "name": pair.name,
                    **{
                        key: {"here": here, "there": there, "change": _change(here, there)}
                        for key, here, there in (
                            (key, _value(pair.here, key), _value(pair.there, key)) for key in _QUANTITIES
                        )
                    },
                }
                for pair in self.levels
            ],
            "layers": [asdict(layer) for layer in self.layers],
            "options": [{"key": key, "here": here, "there": there} for key, here, there in self.options],
        }


def compare(here: Report, there: Report) -> Comparison:
    """Compare a report with another report; levels and layers are matched by name.

    Args:
        here: report of this file.
        there: report of the other file, from which changes are counted.
    """
    ours, theirs = ({level.name: level for level in report.levels} for report in (here, there))
    pairs = [LevelPair(name, ours.get(name), theirs.get(name)) for name in dict.fromkeys([*ours, *theirs])]
    densities = [_densities(report) for report in (here, there)]
    both = [pair.name for pair in pairs if pair.here and pair.there]
    known = all(densities)
    names = list(dict.fromkeys([*densities[0], *densities[1]])) if known else []
    changes = [LayerChange(name, densities[0].get(name, {}), densities[1].get(name, {})) for name in names]
    return Comparison(
        here=here,
        there=there,
        levels=pairs,
        layers=[
            each
            for each in changes
            if not (each.here and each.there) or any(each.here.get(k) != each.there.get(k) for k in both)
        ],
        options=_options(here, there),
        layer_count=len(names) if known else None,
    )


def comparison_tables(comparison: Comparison, *, layers: bool = False) -> list[Sheet]:
    """Return tables of levels, of options that differ and, on request, of layers, with values and changes."""
    sheets = [_level_table(comparison)]
    sheets += [_option_table(comparison)] if comparison.options else []
    return [*sheets, _layer_table(comparison)] if layers and comparison.layers else sheets


def comparison_notes(comparison: Comparison, *, layers: bool = False) -> list[str]:
    """Return notes below the tables of a comparison."""
    here, there = comparison.here, comparison.there
    notes = [f"Changes are from {there.path} to {here.path}."]
    images: dict[tuple[int, int], list[str]] = defaultdict(list)
    if here.architecture != there.architecture:
        notes.append(f"The models differ: {there.architecture} there, {here.architecture} here.")
    for pair in comparison.levels:
        if pair.here is None or pair.there is None:
            only = there if pair.here is None else here
            notes.append(f"Only {only.path} has level {pair.name}.")
        elif (pair.here.classes, pair.here.class_set) != (pair.there.classes, pair.there.class_set):
            notes.append(
                f"Level {pair.name} predicts different classes in each file; accuracies are not comparable."
            )
        elif pair.here.images != pair.there.images:
            images[pair.there.images or 0, pair.here.images or 0].append(pair.name)
    for (before, now), names in images.items():
        notes.append(f"{', '.join(names)}: validated on {before} images there and on {now} here.")
    if comparison.layer_count is None and layers:
        notes.append(
            "Layers are not compared: a stored report lists them only if it was printed with --layers."
        )
    if comparison.layer_count:
        more = "" if layers or not comparison.layers else "; --layers shows them"
        notes.append(
            f"{len(comparison.layers)} of {comparison.layer_count} weights differ in density at some "
            f"level{more}."
        )
    return notes


def _options(here: Report, there: Report) -> list[tuple[str, str | None, str | None]]:
    """Return the options in which the recipes differ, except for the output path."""
    if not (here.recipe and there.recipe):
        return []
    ours, theirs = dict(settings(here.recipe)), dict(settings(there.recipe))
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if key != "output"]
    return [(key, ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)]


def _option_table(comparison: Comparison) -> Sheet:
    keys, ours, theirs = zip(*comparison.options, strict=True)
    sides = [["-" if value is None else value for value in side] for side in (theirs, ours)]
    return Sheet(
        [
            Column("option", keys, is_text=True),
            Column("there", sides[0], is_text=True),
            Column("here", sides[1], is_text=True),
        ]
    )


def _densities(report: Report) -> dict[str, dict[str, float | None]]:
    """Return the share of each weight tensor that each level keeps, by tensor and level."""
    found: dict[str, dict[str, float | None]] = {}
    for level in report.levels:
        for layer in level.layers:
            density = layer.kept / layer.weights if layer.weights else None
            found.setdefault(layer.name, {})[level.name] = density
    return found


@dataclass(frozen=True)
class _Quantity:
    """A quantity of a level, as shown in a comparison.

    Attributes:
        title: title of its column.
        show: formats a value.
        relative: whether its change is shown in percent of the other file's value.
        rank: rank of its columns; see `Column`.
    """

    title: str
    show: Callable[[Any], str]
    relative: bool
    rank: int


SCORES = {metric.key: metric for metric in METRICS}

_QUANTITIES: dict[str, _Quantity] = {
    "sparsity": _Quantity("sparsity", lambda value: f"{value:.4f}", False, 2),
    "width": _Quantity("width", lambda value: f"{value:.4g}", False, 2),
    "depth": _Quantity("depth", lambda value: f"{value:.4g}", False, 2),
    "nonzero_parameters": _Quantity("non-zero", quantity, True, 3),
    "dense_macs": _Quantity("dense MACs", quantity, True, 1),
    "effective_macs": _Quantity("effective MACs", quantity, True, 5),
    "prefix_bytes": _Quantity("prefix MiB", mebibytes, True, 0),
    **{metric.key: _Quantity(f"{metric.title} %", number, False, 0) for metric in METRICS},
}


def _value(level: LevelReport | None, key: str) -> float | None:
    if level is None:
        return None
    if key in SCORES:
        return SCORES[key].score(level) if metric_of(level) is SCORES[key] else None
    value: float | None = getattr(level, key)
    return value


def _change(here: float | None, there: float | None) -> float | None:
    return None if here is None or there is None else here - there


def _level_table(comparison: Comparison) -> Sheet:
    pairs = comparison.levels
    columns = [Column("name", [pair.name for pair in pairs], is_text=True)]
    for key, kind in _QUANTITIES.items():
        values = [(_value(pair.here, key), _value(pair.there, key)) for pair in pairs]
        known = [value for pair in values for value in pair if value is not None]
        if not known or (key in ("sparsity", "width", "depth") and len(set(known)) == 1):
            continue
        cells = ["-" if here is None else kind.show(here) for here, _ in values]
        changes = [_change_text(kind, here, there) for here, there in values]
        # Columns without changes are left out first.
        rank = kind.rank if set(changes) - {"=", "-"} else kind.rank + 10
        columns.append(Column(kind.title, cells, rank=rank))
        columns.append(Column(f"{kind.title.removesuffix(' %')} change", changes, rank=rank))
    return Sheet(columns)


def _change_text(kind: _Quantity, here: float | None, there: float | None) -> str:
    """Format a change: `=`, a difference, or a percentage of the other file's value."""
    change = _change(here, there)
    if change is None:
        return "-"
    if change == 0:
        return "="
    if kind.relative and there:
        return f"{100 * change / there:+.2f} %"
    return f"{change:+.2f}" if kind.title.endswith(" %") else f"{change:+.4g}"


def _layer_table(comparison: Comparison) -> Sheet:
    layers = comparison.layers
    columns = [Column("weight", [layer.name for layer in layers], is_text=True)]
    for pair in comparison.levels:
        if pair.here is None or pair.there is None:
            continue
        here, there = ([each.get(pair.name) for each in side] for side in _sides(layers))
        columns.append(Column(f"density {pair.name}", ["-" if d is None else f"{d:.4f}" for d in here]))
        columns.append(
            Column(f"change {pair.name}", [_density_change(a, b) for a, b in zip(here, there, strict=True)])
        )
    return Sheet(columns)


def _sides(layers: Sequence[LayerChange]) -> tuple[list[dict[str, float | None]], ...]:
    return [layer.here for layer in layers], [layer.there for layer in layers]


def _density_change(here: float | None, there: float | None) -> str:
    change = _change(here, there)
    return "-" if change is None else "=" if change == 0 else f"{change:+.4f}"
