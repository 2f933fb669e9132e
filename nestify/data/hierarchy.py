"""Class hierarchies: the coarse class of each class, and the classes that each level predicts.

A table has one row per class; its first column is the class, and every other column a coarser class:

    fine,coarse
    maple_tree,trees
    oak_tree,trees
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from nestify.errors import DataError, RecipeError, foreign_code
from nestify.file.manifest import ClassMap, Manifest
from nestify.files import is_special
from nestify.text import printable


@dataclass(frozen=True)
class ClassLevels:
    """Which classes each level predicts.

    Attributes:
        class_names: the data's class names, by index; None if it has none.
        hierarchy: coarser sets of classes, finest first; empty if all levels predict the data's own classes.
        of_levels: per level, core first, its classes; None for the data's own. Empty without a hierarchy.
    """

    class_names: tuple[str, ...] | None = None
    hierarchy: tuple[ClassMap, ...] = ()
    of_levels: tuple[ClassMap | None, ...] = ()

    @property
    def parents(self) -> dict[int, Tensor]:
        """By level number, int64 (classes,): the level's class of each of the data's classes.

        Levels that predict the data's own classes are left out.
        """
        return {
            level: torch.tensor(classes.parents)
            for level, classes in enumerate(self.of_levels, start=1)
            if classes is not None
        }

    def class_sets(self, n_levels: int) -> list[str]:
        """Return per level the name of its classes in the hierarchy; empty for the data's own."""
        return [classes.name if classes else "" for classes in self.of_levels or (None,) * n_levels]

    def counts(self, num_classes: int) -> list[int] | None:
        """Return the number of classes of each level; None without a hierarchy.

        Args:
            num_classes: number of the data's classes.
        """
        if not self.hierarchy:
            return None
        return [num_classes if classes is None else len(classes.class_names) for classes in self.of_levels]


def stored_class_levels(manifest: Manifest) -> ClassLevels:
    """Return the classes of the levels that a nested file stores."""
    names = manifest.model.class_names
    levels = range(1, len(manifest.levels) + 1)
    return ClassLevels(
        None if names is None else tuple(names),
        tuple(manifest.hierarchy),
        tuple(manifest.class_map(level) for level in levels) if manifest.hierarchy else (),
    )


def read_class_levels(
    path: str | None, class_names: Sequence[str] | None, wanted: Sequence[str | None], source: str
) -> ClassLevels:
    """Read the classes of the levels of a run.

    Args:
        path: a hierarchy as a CSV file; None if every level predicts the data's own classes.
        class_names: class names of the data.
        wanted: per level, core first, the column that it predicts, or None. By default, the core level
            predicts the coarsest column, the next level the next finer one, and so on; the full level
            predicts the data's own classes.
        source: what messages call the data.

    Raises:
        DataError: if the table cannot be read, or lacks a class of the data.
        RecipeError: if a level names a column that does not exist.
    """
    names = None if class_names is None else tuple(class_names)
    if path is None:
        return ClassLevels(names)
    if names is None:
        raise DataError(f"{path}: a hierarchy needs class names, which {source} does not have")
    maps = {found.name: found for found in _read_maps(Path(path), names)}
    if not any(wanted):
        coarsest_first = list(reversed(maps))[: len(wanted) - 1]
        wanted = [*coarsest_first, *[None] * (len(wanted) - len(coarsest_first))]
    for k, name in enumerate(wanted, start=1):
        if name is not None and name not in maps:
            close = get_close_matches(name, maps, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(map(repr, maps))}"
            raise RecipeError(f"level[{k}].classes = {name!r} is not a column of {path}; {hint}")
    return ClassLevels(
        names, tuple(maps.values()), tuple(None if name is None else maps[name] for name in wanted)
    )


def coarse_target(target: Tensor, parents: Tensor | None, classes: int | None = None) -> Tensor:
    """Convert a target to the classes of a level.

    Args:
        target: class indices (B,), or probabilities (B, classes), which are summed over each coarse class.
        parents: int64 (classes,), the level's class of each class; None leaves the target unchanged.
        classes: number of the level's classes; None computes it, which waits for a GPU.

    Returns:
        (B,), or (B, classes of the level).
    """
    if parents is None:
        return target
    parents = parents.to(target.device)
    if not target.is_floating_point():
        return parents[target]
    summed = target.new_zeros(len(target), int(parents.max()) + 1 if classes is None else classes)
    return summed.index_add_(1, parents, target)


def _read_maps(path: Path, class_names: Sequence[str]) -> list[ClassMap]:
    columns, rows = _read_table(path)
    missing = [name for name in class_names if name not in rows]
    if missing:
        close = get_close_matches(missing[0], rows, n=1)
        hint = f"; did you mean it by {close[0]!r}?" if close else "; add a row for it"
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise DataError(f"{path}: lacks the class {missing[0]!r}{others}{hint}")
    maps = []
    for place, column in enumerate(columns):
        own = [rows[name][place] for name in class_names]
        coarse = sorted(set(own))
        index = {name: number for number, name in enumerate(coarse)}
        maps.append(ClassMap(name=column, class_names=coarse, parents=[index[name] for name in own]))
    return maps


def _read_table(path: Path) -> tuple[list[str], Mapping[str, list[str]]]:
    """Read the names of the coarser columns, and their values by class."""
    if is_special(path):
        raise DataError(f"{path}: is not a regular file; give a CSV table as --hierarchy")

    def describe(reason: str) -> DataError:
        return DataError(f"{path}: is not a CSV table in UTF-8 ({reason}); save it as one")

    with foreign_code(describe):
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                lines = [[cell.strip() for cell in line] for line in csv.reader(file, strict=True) if line]
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    for number, line in enumerate(lines, start=1):
        if hidden := [cell for cell in line if printable(cell, None) != cell]:
            raise DataError(
                f"{path}: row {number} has {hidden[0]!r}, with a character that is not visible; remove it"
            )
    if not lines or len(lines[0]) < 2:
        raise DataError(f"{path}: has no column of coarser classes; its first line must be like fine,coarse")
    header = lines[0]
    if len(set(header)) < len(header) or "" in header:
        raise DataError(
            f"{path}: its columns {', '.join(map(repr, header))} have equal or empty names; rename them"
        )
    rows: dict[str, list[str]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header) or "" in line:
            raise DataError(
                f"{path}: row {number} does not have one value for each of {', '.join(header)}; add it"
            )
        if rows.setdefault(line[0], line[1:]) != line[1:]:
            raise DataError(
                f"{path}: row {number} gives a different class for {line[0]!r} than before; remove one"
            )
    return header[1:], rows
