"""Budgets as plain data: what a level may cost, as users write it. No torch here."""

import math
import re
from dataclasses import dataclass
from typing import Literal

Quantity = Literal["macs", "params", "bytes"]

TOLERANCE = 0.02
"""How far a level may be from its budget, relative to it."""

_UNITS = {
    "macs": {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
    "params": {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9},
    "bytes": {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30},
}
_AMOUNTS = {
    "macs": "give 500M, 1G or a number",
    "params": "give 2M or a number",
    "bytes": "give 4MB, 4MiB or a number",
}
_FORM = "give macs=0.25 (a share of the full level's), macs=100M, params=2M or bytes=4MB"


@dataclass(frozen=True)
class Budget:
    """What one level may cost.

    Attributes:
        quantity: `macs` (multiply-accumulates per image: of a level that masks weights the effective ones, of
            others those that dense kernels execute), `params` (parameters that are not masked out) or
            `bytes` (of the nested file up to and with the level, header included).
        amount: of it; with `is_share` a share of the full level's, below 1.
    """

    quantity: Quantity
    amount: float
    is_share: bool

    def target(self, full: float) -> float:
        """The amount in units of the quantity, where the full level has `full`."""
        return self.amount * full if self.is_share else self.amount

    def __str__(self) -> str:
        return f"{self.quantity}={self.amount:g}"


def parse_budget(text: str) -> Budget:
    """Read `macs=0.25`, `macs=100M`, `params=2M` or `bytes=4MB`; a number below 1 is a share.

    Raises:
        ValueError: if the text is none of these.
    """
    found = re.fullmatch(r"(macs|params|bytes) *= *(.*)", text)
    read = _read(found[1], found[2]) if found else None  # type: ignore[arg-type]  # no other is matched
    if found is None or read is None:
        raise ValueError(f"budget {text!r} is not understood; {_FORM}")
    amount, has_unit = read
    is_share = amount < 1 and not has_unit
    if not (amount > 0 and math.isfinite(amount)):
        raise ValueError(f"budget {text!r} is not above 0; {_FORM}")
    quantity: Quantity = found[1]  # type: ignore[assignment]  # the expression allows no other
    return Budget(quantity, amount, is_share)


def parse_amount(quantity: Quantity, text: str) -> float:
    """Read `4MB`, `4MiB`, `1G` or a plain number of bytes, MACs or parameters.

    Raises:
        ValueError: with a predicate, if it is none, or not above 0.
    """
    read = _read(quantity, text)
    if read is None or not (read[0] >= 1 and math.isfinite(read[0])):
        raise ValueError(f"is not an amount of {quantity}; {_AMOUNTS[quantity]}")
    return read[0]


def _read(quantity: Quantity, text: str) -> tuple[float, bool] | None:
    """An amount, and whether it has a unit; None where it is not understood."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?) *([A-Za-z]*)", text.strip())
    scale = _UNITS[quantity].get(found[2].upper()) if found else None
    return None if found is None or scale is None else (float(found[1]) * scale, bool(found[2]))
