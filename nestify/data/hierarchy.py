"""Class hierarchies: which coarse class each class belongs to, and which classes each level tells.

A table of one row per class, the first column its own name and every other column a coarser class:

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

from nestify.errors import DataError, RecipeError
from nestify.file.manifest import ClassMap, Manifest


@dataclass(frozen=True)
class ClassLevels:
    """What the levels of a nested network tell.

    Attributes:
        class_names: of the data, by index; None where it has no names.
        hierarchy: coarser sets of classes, the finest first; empty: all levels tell the data's own classes.
        of_levels: per level, core first: its classes; None for the data's own. Empty without a hierarchy.
    """

    class_names: tuple[str, ...] | None = None
    hierarchy: tuple[ClassMap, ...] = ()
    of_levels: tuple[ClassMap | None, ...] = ()

    @property
    def parents(self) -> dict[int, Tensor]:
        """By level number: int64 (classes,), the level's class of each of the data's classes.

        Levels that tell the data's own classes are left out.
        """
        return {
            level: torch.tensor(classes.parents)
            for level, classes in enumerate(self.of_levels, start=1)
            if classes is not None
        }

    def class_sets(self, n_levels: int) -> list[str]:
        """Per level the name of its classes in the hierarchy; empty for the data's own."""
        return [classes.name if classes else "" for classes in self.of_levels or (None,) * n_levels]

    def counts(self, num_classes: int) -> list[int] | None:
        """How many classes each level tells; None without a hierarchy.

        Args:
            num_classes: of the data.
        """
        if not self.hierarchy:
            return None
        return [num_classes if classes is None else len(classes.class_names) for classes in self.of_levels]


def stored_class_levels(manifest: Manifest) -> ClassLevels:
    """The labels that a nested file holds."""
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
    """The labels of a run.

    Args:
        path: a hierarchy as a CSV file; None: every level tells the data's own classes.
        class_names: of the data.
        wanted: per level, core first: the column that it tells, or None. Where no level asks for a column,
            the core level tells the coarsest one, the level above the next finer one, and so on; the full
            level tells the data's own classes.
        source: what messages call the data.

    Raises:
        DataError: if the table cannot be read, or lacks a class of the data.
        RecipeError: if a level asks for a column that there is not.
    """
    names = None if class_names is None else tuple(class_names)
    if path is None:
        return ClassLevels(names)
    if names is None:
        raise DataError(f"{path}: a hierarchy needs classes with names, which {source} does not tell")
    maps = {found.name: found for found in _read_maps(Path(path), names)}
    if not any(wanted):
        coarsest_first = list(reversed(maps))[: len(wanted) - 1]
        wanted = [*coarsest_first, *[None] * (len(wanted) - len(coarsest_first))]
    for k, name in enumerate(wanted, start=1):
        if name is not None and name not in maps:
            close = get_close_matches(name, maps, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(map(repr, maps))}"
            raise RecipeError(f"level[{k}].classes = {name!r} is no column of {path}; {hint}")
    return ClassLevels(
        names, tuple(maps.values()), tuple(None if name is None else maps[name] for name in wanted)
    )


def coarse_target(target: Tensor, parents: Tensor | None, classes: int | None = None) -> Tensor:
    """A target as a level has it.

    Args:
        target: class indices (B,), or probabilities (B, classes), of which those of one coarse class add up.
        parents: int64 (classes,), the level's class of each class; None leaves the target as it is.
        classes: how many the level tells; None looks it up, for which a GPU must be waited for.

    Returns:
        (B,), or (B, the level's classes).
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
    """Names of the coarser columns, and their values by class."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [[cell.strip() for cell in line] for line in csv.reader(file, strict=True) if line]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: is no CSV table in UTF-8 ({error}); save it as one") from error
    if not lines or len(lines[0]) < 2:
        raise DataError(f"{path}: has no column of coarser classes; its first line is to be like fine,coarse")
    header = lines[0]
    if len(set(header)) < len(header) or "" in header:
        raise DataError(
            f"{path}: its columns {', '.join(map(repr, header))} are not named apart; rename them"
        )
    rows: dict[str, list[str]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header) or "" in line:
            raise DataError(f"{path}: row {number} has not one value for each of {', '.join(header)}; add it")
        if rows.setdefault(line[0], line[1:]) != line[1:]:
            raise DataError(
                f"{path}: row {number} tells another class for {line[0]!r} than before; remove one"
            )
    return header[1:], rows
