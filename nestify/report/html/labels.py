"""Placement of labels next to points, so that they overlap neither each other nor points. Pure arithmetic."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

FONT_SIZE = 11
CELL = 0.62 * FONT_SIZE
"""Width of a letter, slightly more than in monospaced fonts."""
LINE = 1.2 * FONT_SIZE
"""Height of a line."""
BASELINE = 0.9 * FONT_SIZE
"""Distance from the top of a line to the baseline of its letters."""
LONGEST = 16
"""Maximum number of letters of a label; longer names are shortened in the middle."""

_NEAR = 8.0
_DISTANCES = (_NEAR, 14.0, 22.0, 32.0, 44.0)
_DIRECTIONS = ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, -1), (0, 1))


@dataclass(frozen=True)
class Box:
    """A rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        """Return whether two rectangles share more than their edges."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def contains(self, other: "Box") -> bool:
        """Return whether another rectangle is completely inside this one."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and other.right <= self.right
            and other.bottom <= self.bottom
        )


@dataclass(frozen=True)
class Label:
    """A placed label of a point.

    Attributes:
        text: the name, shortened if it is long.
        box: rectangle that the text covers.
        leader: line (x1, y1, x2, y2) from the point to the label; None if the label is next to its point.
    """

    text: str
    box: Box
    leader: tuple[float, float, float, float] | None

    @property
    def baseline(self) -> float:
        """The y coordinate of the baseline of its letters."""
        return self.box.top + BASELINE

    @property
    def leader_box(self) -> Box:
        """Rectangle around the leader; empty if there is no leader."""
        if self.leader is None:
            return Box(self.box.left, self.box.top, self.box.left, self.box.top)
        x1, y1, x2, y2 = self.leader
        return Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))


def place_labels(
    names: Sequence[str],
    points: Sequence[tuple[float, float]],
    taken: Sequence[Box],
    lines: Sequence[Box],
    room: Box,
) -> list[Label | None]:
    """Place each name as near to its point as there is room.

    Args:
        names: names to place.
        points: (x, y) per name.
        taken: rectangles that no label may overlap, such as the marks of the points.
        lines: rectangles that a label overlaps only if there is no other place.
        room: rectangle that contains all labels.

    Returns:
        One label per name; None if there is no room for it.
    """
    labels: list[Label | None] = []
    for name, point in zip(names, points, strict=True):
        placed = [label for label in labels if label is not None]
        boxes = [label.box for label in placed]
        occupied = [*taken, *boxes, *(label.leader_box for label in placed)]
        free = [
            label
            for label in _candidates(shorten(name), *point)
            if room.contains(label.box)
            and not any(map(label.box.overlaps, occupied))
            and not any(map(label.leader_box.overlaps, boxes))
        ]
        clear = (label for label in free if not any(map(label.box.overlaps, lines)))
        labels.append(next(clear, free[0] if free else None))
    return labels


def shorten(name: str) -> str:
    """Return a name with its middle left out if it takes more than `LONGEST` letters."""
    if cell_len(name) <= LONGEST:
        return name
    head, tail = LONGEST // 2, (LONGEST - 1) // 2
    return f"{set_cell_size(name, head)}…{set_cell_size(name[::-1], tail)[::-1]}"


def _candidates(text: str, x: float, y: float) -> Iterator[Label]:
    """Yield possible labels around a point, the nearest first."""
    width = cell_len(text) * CELL
    for distance in _DISTANCES:
        for across, down in _DIRECTIONS:
            away = distance if not across or not down else 0.7 * distance
            middle_x = x + across * (away + width / 2)
            middle_y = y + down * (away + LINE / 2)
            box = Box(middle_x - width / 2, middle_y - LINE / 2, middle_x + width / 2, middle_y + LINE / 2)
            end = (min(max(x, box.left), box.right), min(max(y, box.top), box.bottom))
            yield Label(text, box, None if distance == _NEAR else (x, y, *end))
