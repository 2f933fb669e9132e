"""Names beside points: none over another, none over a point, none outside. Pure arithmetic."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

FONT_SIZE = 11
CELL = 0.62 * FONT_SIZE
"""Width of a letter, a little more than monospaced fonts have."""
LINE = 1.2 * FONT_SIZE
BASELINE = 0.9 * FONT_SIZE
"""From the top of a line to the foot of its letters."""
LONGEST = 16
"""Letters of a label; longer names lose their middle."""

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
        """Whether they have more in common than their edges."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def holds(self, other: "Box") -> bool:
        """Whether nothing of the other lies outside."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and other.right <= self.right
            and other.bottom <= self.bottom
        )


@dataclass(frozen=True)
class Label:
    """A name in its place.

    Attributes:
        text: shortened where it is long.
        box: room that it takes.
        leader: (x1, y1, x2, y2) of a line from the point, where the label is not next to it.
    """

    text: str
    box: Box
    leader: tuple[float, float, float, float] | None

    @property
    def baseline(self) -> float:
        """y of the foot of its letters."""
        return self.box.top + BASELINE

    @property
    def leader_box(self) -> Box:
        """Room around the leader; none beside the label where there is no leader."""
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
    """Find a place for each name, as near to its point as there is room.

    Args:
        points: (x, y) per name.
        taken: where no label may lie, such as the marks of the points. `lines`: where one lies only if
            there is no other place.
        room: what labels must lie in.

    Returns:
        one per name; None where there is no place for it.
    """
    labels: list[Label | None] = []
    for name, point in zip(names, points, strict=True):
        placed = [label for label in labels if label is not None]
        boxes = [label.box for label in placed]
        occupied = [*taken, *boxes, *(label.leader_box for label in placed)]
        free = [
            label
            for label in _candidates(shortened(name), *point)
            if room.holds(label.box)
            and not any(map(label.box.overlaps, occupied))
            and not any(map(label.leader_box.overlaps, boxes))
        ]
        clear = (label for label in free if not any(map(label.box.overlaps, lines)))
        labels.append(next(clear, free[0] if free else None))
    return labels


def shortened(name: str) -> str:
    """The name without its middle, where it takes more than `LONGEST` letters."""
    if cell_len(name) <= LONGEST:
        return name
    head, tail = LONGEST // 2, (LONGEST - 1) // 2
    return f"{set_cell_size(name, head)}…{set_cell_size(name[::-1], tail)[::-1]}"


def _candidates(text: str, x: float, y: float) -> Iterator[Label]:
    """Places around a point, the nearest first."""
    width = cell_len(text) * CELL
    for distance in _DISTANCES:
        for across, down in _DIRECTIONS:
            away = distance if not across or not down else 0.7 * distance
            middle_x = x + across * (away + width / 2)
            middle_y = y + down * (away + LINE / 2)
            box = Box(middle_x - width / 2, middle_y - LINE / 2, middle_x + width / 2, middle_y + LINE / 2)
            end = (min(max(x, box.left), box.right), min(max(y, box.top), box.bottom))
            yield Label(text, box, None if distance == _NEAR else (x, y, *end))
