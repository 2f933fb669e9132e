"""Budgets and amounts as plain data, as users write them. Does not import torch."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Quantity = Literal["macs", "params", "bytes", "latency"]
Limited = Literal["latency", "bytes", "macs", "params", "top1"]

LEAST_PERCENTAGE = 5
"""Smallest number that is assumed to be a percentage where a share from 0 to 1 is expected."""

TOLERANCE = 0.02
"""Largest difference of a level from its budget, relative to the budget."""

LATENCY_TOLERANCE = 0.1
"""Share by which the measured latency of a level may exceed its budget."""

_UNITS: Mapping[str, Mapping[str, float]] = {
    "macs": {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
    "params": {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9},
    "bytes": {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30},
    "latency": {"US": 1e-6, "MS": 1e-3, "S": 1},
    "top1": {"": 1, "%": 1},
}
_COUNTS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_SHOWN: Mapping[Limited, Sequence[tuple[float, str]]] = {
    "latency": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    "macs": _COUNTS,
    "params": _COUNTS,
    "top1": ((1.0, "%"),),
}
_NUMBER = r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?) *([A-Za-z%]*)"
_BUDGET = f"(macs|params|bytes|latency) *= *{_NUMBER}"
BUDGET_FORM = f"^{_BUDGET}$"
"""Regular expression of what `parse_budget` reads, but for the units of each quantity."""
_FORM = "give macs=0.25 (a share of the full level's), macs=100M, params=2M, bytes=4MB or latency=0.3"


@dataclass(frozen=True)
class Budget:
    """The largest cost of one level.

    Attributes:
        quantity: `macs` (multiply-accumulates per image: the effective ones for levels of masked weights, and
            those that dense kernels execute for others), `params` (parameters that are not masked out),
            `bytes` (prefix bytes of the level, header included) or `latency` (time for one image on the
            sparse engine, on one thread; always a share).
        amount: amount of the quantity, or with `is_share` a share of the full level's, below 1.
        is_share: whether the amount is a share.
    """

    quantity: Quantity
    amount: float
    is_share: bool

    def target(self, full: float) -> float:
        """Return the amount in units of the quantity, if the full level has `full`."""
        return self.amount * full if self.is_share else self.amount

    def __str__(self) -> str:
        return f"{self.quantity}={self.amount:g}"


def parse_budget(text: str) -> Budget:
    """Read `macs=0.25`, `macs=100M`, `params=2M`, `bytes=4MB` or `latency=0.3`; below 1 is a share.

    Raises:
        ValueError: if the text is none of these.
    """
    found = re.fullmatch(_BUDGET, text)
    if found and found[1] == "latency" and found[3] != "%":
        if found[3] or float(found[2]) >= 1:
            raise ValueError(
                f"budget {text!r} is no share of the full level's time; give one below 1, as in latency=0.3"
            )
        return _positive(Budget("latency", float(found[2]), is_share=True), text)
    scale = _UNITS[found[1]].get(found[3].upper()) if found else None
    if found is None or scale is None:
        percent = re.fullmatch(r"(macs|params|bytes|latency) *= *(.*%)", text)
        meant = share_meant(percent[2]) if percent else None
        form = f"did you mean {percent[1]}={meant:.6g}?" if percent and meant else _FORM
        raise ValueError(f"budget {text!r} is not understood; {form}")
    amount = float(found[2])
    quantity: Quantity = found[1]  # type: ignore[assignment]  # the expression allows no other
    return _positive(Budget(quantity, amount * scale, amount < 1 and not found[3]), text)


def _positive(budget: Budget, text: str) -> Budget:
    if not 0 < budget.amount < math.inf:
        raise ValueError(f"budget {text!r} is not above 0; {_FORM}")
    return budget


def share_meant(value: object) -> float | None:
    """Return the share that a percentage stands for: 0.95 for 95 and for `95%`; None if it is none.

    A number without a sign counts as a percentage from `LEAST_PERCENTAGE` on.
    """
    percent, has_sign = _percentage(value)
    if percent is None or not 0 <= percent <= 100 or not (has_sign or percent >= LEAST_PERCENTAGE):
        return None
    return percent / 100


def percent_meant(value: object) -> float | None:
    """Return the percent that a share, or a text such as `70%`, stands for: 70 for 0.7; None if it is none.

    A number counts as a share if it is above 0 and below 1.
    """
    number, has_sign = _percentage(value)
    if number is None or not 0 <= number <= 100:
        return None
    if has_sign:
        return number
    return 100 * number if 0 < number < 1 else None


def _percentage(value: object) -> tuple[float | None, bool]:
    """Return a value's number, or that of a text such as `95%`, and whether it has a percent sign."""
    if isinstance(value, str) and (found := re.fullmatch(r"([0-9]*\.?[0-9]+) *%", value.strip())):
        return float(found[1]), True
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (float(value), False) if is_number else (None, False)  # type: ignore[arg-type]


def did_you_mean(value: float | None) -> str:
    """Return the end of a sentence that suggests a value: `; did you mean 0.95?`; empty for None."""
    return "" if value is None else f"; did you mean {value:.6g}?"


def parse_amount(limited: Limited, text: str) -> float:
    """Read an amount: `10ms` (in seconds), `4MB` or `4MiB`, `100M` MACs, `2M` parameters, `70` percent.

    Raises:
        ValueError: if the text is none of these, or not above 0 and finite; latency needs its unit.
    """
    found = re.fullmatch(_NUMBER, text.strip())
    scale = _UNITS[limited].get(found[2].upper()) if found else None
    if found is None or scale is None:
        raise ValueError(f"{text!r} is not understood")
    if not 0 < (amount := float(found[1]) * scale) < math.inf:
        raise ValueError(f"{text!r} is not above 0 and finite")
    return amount


def parse_limit(limited: Limited, text: str) -> float:
    """Read an amount as `parse_amount` does, but no number below 1, which is probably meant as a share.

    Raises:
        ValueError: as `parse_amount`, or if the text is such a number without a unit.
    """
    amount = parse_amount(limited, text)
    if limited != "latency" and amount < 1 and re.fullmatch(r"[0-9.e+-]+", text.strip()):
        hint = did_you_mean(percent_meant(amount)) if limited == "top1" else ", not an amount"
        raise ValueError(f"{text!r} is a share{hint}")
    return amount


def show_amount(limited: Limited, value: float) -> str:
    """Format an amount with five digits and its unit, as `parse_amount` reads it."""
    units = _SHOWN[limited]
    scale, unit = next((pair for pair in units if value >= pair[0]), units[-1])
    return f"{value / scale:.5g}{unit}"
