"""Axes: round ticks, and where values come to lie. Pure arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

MOST_TICKS = 6


@dataclass(frozen=True)
class Tick:
    """A round value of an axis, and how it is written."""

    value: float
    text: str


@dataclass(frozen=True)
class Scale:
    """Maps values linearly onto positions, the first tick to `begin`, the last one to `end`."""

    ticks: tuple[Tick, ...]
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        """Position of a value."""
        first, last = self.ticks[0].value, self.ticks[-1].value
        return self.begin + (value - first) / (last - first) * (self.end - self.begin)


def round_ticks(low: float, high: float, unit: int = 1, suffix: str = "") -> tuple[Tick, ...]:
    """From two to `MOST_TICKS` multiples of 1, 2 or 5 times a power of ten units, from `low` or below to
    `high` or above, all with the same number of digits after the point.

    Args:
        unit: what one is on the axis, in units of the values. `suffix`: stands behind all texts but "0".
    """
    assert low < high
    least, most = (Decimal(value) / unit for value in (low, high))
    power = math.floor(math.log10((most - least) / (MOST_TICKS - 1)))
    for mantissa in (1, 2, 5, 10, 20, 50):  # the last one does in any case
        step = Decimal(mantissa).scaleb(power).normalize()
        first = int((least / step).to_integral_value(ROUND_FLOOR))
        last = int((most / step).to_integral_value(ROUND_CEILING))
        if last - first < MOST_TICKS:
            break
    rounded = [step * index for index in range(first, last + 1)]
    return tuple(Tick(float(value * unit), f"{value:f}{suffix}" if value else "0") for value in rounded)


def percent_ticks(values: Sequence[float]) -> tuple[Tick, ...]:
    """Ticks around percentages, the first and the last a point apart at least."""
    low, high = min(values), max(values)
    if high - low < 1:
        low = min(max((low + high - 1) / 2, 0.0), 99.0)
        high = low + 1
    return round_ticks(low, high)


def count_ticks(largest: float) -> tuple[Tick, ...]:
    """Ticks from 0 to a number of MACs or more, in k, M or G."""
    for unit, suffix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if largest >= unit:
            return round_ticks(0, largest, unit, suffix)
    return round_ticks(0, max(largest, 1))


def mebibyte_ticks(largest: int) -> tuple[Tick, ...]:
    """Ticks from 0 to a number of bytes or more, in MiB."""
    return round_ticks(0, max(largest, 1), 2**20)
