"""What `scan` measured, as a page with a plot: the divergence of each change on a logarithmic axis."""

from dataclasses import dataclass
from math import log10
from typing import TYPE_CHECKING

from nestify.report.html.page import templates
from nestify.report.scan import PARTS, group_by_name, scan_screen

if TYPE_CHECKING:
    from nestify.compression.candidates import Change
    from nestify.compression.scan import Scan

DECADES = (-5, 1)
"""The axis goes from 10 to the first to 10 to the second power, in nats; smaller values are at its start."""

MOST_LETTERS = 28
"""Number of letters of a name that fit in front of the axis."""

ROW = 18
LEFT, WIDTH = 190, 640
"""Height of a row, where the axis starts and where it ends, in units of SVG."""


@dataclass(frozen=True)
class Dot:
    """One change in a plot.

    Attributes:
        x: horizontal position.
        share: how strongly it is drawn, in percent; the largest change is drawn most strongly.
        text: shown when the pointer is over it.
    """

    x: float
    share: int
    text: str


@dataclass(frozen=True)
class Row:
    """The changes of one layer, group or block.

    Attributes:
        name: its name, shortened to fit.
        y: vertical position.
        dots: its changes.
    """

    name: str
    y: float
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Plot:
    """The changes of one kind.

    Attributes:
        title: what the rows are.
        rows: rows, from top to bottom.
        ticks: positions and texts of the axis.
        height: height in units of SVG.
    """

    title: str
    rows: tuple[Row, ...]
    ticks: tuple[tuple[float, str], ...]
    height: int


def scan_page(scan: "Scan") -> str:
    """Return a scan as one page that needs no other file, no network and no script; ASCII only."""
    screen = scan_screen(scan)
    template = templates().get_template("scan.html.j2")
    text = template.render(
        model=scan.model,
        title=screen.title,
        sheets=screen.sheets,
        notes=screen.notes,
        plots=plots(scan),
        recipe=scan.suggestion.recipe if scan.suggestion else "",
        left=LEFT,
        width=WIDTH,
    )
    return text.encode("ascii", "xmlcharrefreplace").decode()


def plots(scan: "Scan") -> list[Plot]:
    """Return a plot for each kind of change."""
    found = []
    for kind, (title, _, axis) in PARTS.items():
        by_name = group_by_name([change for change in scan.changes if change.kind == kind])
        if not by_name:
            continue
        rows = []
        for number, (name, changes) in enumerate(by_name.items()):
            ranked = sorted(changes.values(), key=lambda change: change.measured.divergence)
            dots = tuple(
                Dot(_position(change.measured.divergence), 100 * rank // len(ranked), _describe(change, axis))
                for rank, change in enumerate(ranked, start=1)
            )
            rows.append(Row(_short(name), 30 + ROW * number, dots))
        ticks = tuple(
            (_position(10.0**power), f"{10.0**power:g}") for power in range(DECADES[0], DECADES[1] + 1)
        )
        found.append(Plot(title, tuple(rows), ticks, 40 + ROW * len(rows)))
    return found


def _short(name: str) -> str:
    """Return the end of a name that fits in front of the axis."""
    return name if len(name) <= MOST_LETTERS else f"...{name[-MOST_LETTERS + 3 :]}"


def _describe(change: "Change", axis: str) -> str:
    what = f"{change.name}, {axis} {change.amount:g}" if axis else f"without {change.name}"
    found = change.measured
    return f"{what}: divergence {found.divergence:.2g}, agreement {found.agreement:.1f} %"


def _position(divergence: float) -> float:
    low, high = DECADES
    power = min(max(log10(divergence) if divergence > 0 else low, low), high)
    return LEFT + (power - low) / (high - low) * (WIDTH - 10 - LEFT)
