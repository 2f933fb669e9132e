"""Tables of images that may have several labels each.

A table is a CSV file whose first line names its columns. It lists the labels of each image,

    file,labels
    a.jpg,cat;sofa
    b.jpg,

or has a column of 0 and 1 for each label:

    file,cat,sofa
    a.jpg,1,1
    b.jpg,0,0
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from nestify.data.listing import SPLITS, natural_key
from nestify.errors import DataError, foreign_code
from nestify.files import is_special
from nestify.text import printable

FILE, LABELS = "file", "labels"
"""Names of the columns of a table that lists labels; the first one is that of every table."""

SEPARATOR = ";"

FORMAT = "--labels takes a CSV table with the columns file,labels, or file and one of 0 and 1 for each label"


@dataclass(frozen=True)
class LabelTable:
    """The labels of images.

    Attributes:
        path: the file, for messages.
        names: the labels: columns in their order, or in natural order if they were listed.
        rows: indices of the labels of each image, by its path in the table.
    """

    path: str
    names: tuple[str, ...]
    rows: dict[str, tuple[int, ...]]

    def is_at(self, path: Path) -> bool:
        """Whether the table is at a path."""
        return path.exists() and path.samefile(self.path)

    def targets_of(self, root: Path, images: Sequence[str]) -> tuple[list[tuple[int, ...]], list[str]]:
        """Return the labels of images, and sentences about rows and labels that have no image.

        Args:
            root: the folder or tar that holds the images: of a split, or of all of them.
            images: paths of the images below it. The table may put the name of the folder before them.

        Raises:
            DataError: if an image is not in the table, or no image has a label.
        """
        prefixes = ("", f"{root.name.removesuffix('.tar')}/")
        forms = [normalize("NFC", name) for name in images]
        found = [
            next((f"{prefix}{name}" for prefix in prefixes if f"{prefix}{name}" in self.rows), None)
            for name in forms
        ]
        if missing := [name for name, row in zip(images, found, strict=True) if row is None]:
            others = f" and {len(missing) - 1} other images" if len(missing) > 1 else ""
            raise DataError(
                f"{self.path}: no row for {missing[0]}{others} of {root}; add rows, with an empty list for "
                "an image without labels, or remove the images"
            )
        targets = [self.rows[row] for row in found if row is not None]
        used = {label for target in targets for label in target}
        if not used:
            raise DataError(f"{self.path}: no image of {root} has a label; check the table")
        notices = []
        splits = tuple(f"{split}/" for split in SPLITS)  # rows of another split are no mistake
        if rest := [row for row in self.rows.keys() - set(found) if not row.startswith(splits)]:
            notices.append(f"{len(rest)} rows of {self.path}, such as {min(rest)}, name no image here")
        if absent := [name for index, name in enumerate(self.names) if index not in used]:
            few = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
            notices.append(f"no image has the label {few} of {self.path}; precisions leave it out")
        return targets, notices


def read_labels(path: str) -> LabelTable:
    """Read a table of labels.

    Raises:
        DataError: if it cannot be read, or is not such a table.
    """
    if is_special(Path(path)):
        raise DataError(f"{path}: is not a regular file; {FORMAT}")
    with foreign_code(lambda reason: DataError(f"{path}: is not a CSV table in UTF-8 ({reason}); {FORMAT}")):
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                lines = [[cell.strip() for cell in line] for line in csv.reader(file, strict=True) if line]
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); {FORMAT}") from error
    header = lines[0] if lines else []
    if len(header) < 2 or header[0].lower() != FILE:
        start = f", and it begins with {','.join(header)[:40]!r}" if header else ", and it is empty"
        raise DataError(f"{path}: the first line must be {FILE},{LABELS} or {FILE} and the labels{start}")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header) or not line[0]:
            raise DataError(
                f"{path}: row {number} has {len(line)} cells, and the first line has {len(header)}, of which "
                "the first must not be empty; if labels have commas, put them in quotes"
            )
    listed = len(header) == 2 and header[1].lower() == LABELS
    given = _listed(lines[1:]) if listed else _marked(path, header, lines[1:])
    names = sorted({name for row in given for name in row}, key=natural_key) if listed else header[1:]
    _check_names(path, names)
    index = {name: number for number, name in enumerate(names)}
    rows: dict[str, tuple[int, ...]] = {}
    for number, (line, own) in enumerate(zip(lines[1:], given, strict=True), start=2):
        name = normalize("NFC", line[0].replace("\\", "/").removeprefix("./"))
        labels = tuple(sorted({index[label] for label in own}))
        if rows.setdefault(name, labels) != labels:
            raise DataError(
                f"{path}: row {number} gives other labels for {name} than a row before; remove one"
            )
    return LabelTable(path, tuple(names), rows)


def _listed(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the labels of each row of a table that lists them."""
    return [[label.strip() for label in cells.split(SEPARATOR) if label.strip()] for _, cells in lines]


def _marked(path: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the labels of each row of a table with a column for each label."""
    given = []
    for number, line in enumerate(lines, start=2):
        for name, cell in zip(header[1:], line[1:], strict=True):
            if cell not in ("0", "1"):
                raise DataError(
                    f"{path}: row {number} has {cell!r} in the column {name}; give 1 if the image has the "
                    f"label, else 0, or list labels in one column {LABELS}"
                )
        given.append([name for name, cell in zip(header[1:], line[1:], strict=True) if cell == "1"])
    return given


def _check_names(path: str, names: Sequence[str]) -> None:
    if not names:
        raise DataError(f"{path}: has no labels; {FORMAT}")
    for name in names:
        if not name or printable(name, None) != name:
            raise DataError(f"{path}: {name!r} is not a label's name; give it visible characters")
    forms = [normalize("NFC", name) for name in names]
    if repeated := [name for name in forms if forms.count(name) > 1]:
        raise DataError(f"{path}: two labels are named {repeated[0]!r}; rename or remove one")
