"""Levels and patterns as plain data: what a user requests of each level. Does not import torch."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from nestify.recipe.amounts import Budget, did_you_mean, share_meant

LONGEST_NAME = 200
"""Largest number of characters of a level's name."""

MAX_LEVELS = 254  # entry levels are stored as uint8, and n + 1 means "no level uses it"


@dataclass(frozen=True)
class Pattern:
    """Arrangement of the kept weights of a layer.

    Attributes:
        kind: `unstructured`: single weights. `n:m`: at most n weights of every group of m consecutive input
            channels are kept. `block`: complete blocks of rows x cols (output x input channels, at each
            kernel position) are kept or dropped.
        n: number of kept weights of a group for `n:m`, otherwise 0.
        m: size of a group for `n:m`, otherwise 0.
        rows: output channels of a `block`, otherwise 1.
        cols: input channels of a `block`, otherwise 1.
    """

    kind: Literal["unstructured", "n:m", "block"] = "unstructured"
    n: int = 0
    m: int = 0
    rows: int = 1
    cols: int = 1

    @property
    def sparsity(self) -> float | None:
        """The sparsity that `n:m` implies; None for other patterns."""
        return 1 - self.n / self.m if self.kind == "n:m" else None

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.n}:{self.m}"
        return f"{self.rows}x{self.cols}" if self.kind == "block" else self.kind


_N_OF_M = "([0-9]{1,3}):([0-9]{1,3})"
_BLOCK = "([0-9]{1,4})x([0-9]{1,4})"
COMMON_PATTERN_FORM = f"^(unstructured|{_BLOCK})$"
PATTERN_FORM = f"^(unstructured|{_N_OF_M}|{_BLOCK})$"
"""Regular expression of what `parse_pattern` reads, but for the sizes of the numbers."""


def parse_pattern(text: str) -> Pattern:
    """Read `unstructured`, `N:M` (as in `2:4`) or `RxC` (as in `32x1`).

    Raises:
        ValueError: if the text is none of these.
    """
    if text == "unstructured":
        return Pattern()
    if found := re.fullmatch(_N_OF_M, text):
        n, m = int(found[1]), int(found[2])
        if not 1 <= n < m:
            raise ValueError(f"pattern {text!r} keeps {n} of {m}; N:M needs 1 <= N < M")
        return Pattern("n:m", n=n, m=m)
    if found := re.fullmatch(_BLOCK, text):
        rows, cols = int(found[1]), int(found[2])
        if rows < 1 or cols < 1 or rows * cols < 2:
            raise ValueError(f"pattern {text!r} is not a block; RxC needs at least two weights")
        return Pattern("block", rows=rows, cols=cols)
    raise ValueError(f"pattern {text!r} is not one of unstructured, N:M (2:4) or RxC (32x1)")


@dataclass(frozen=True)
class Level:
    """One level of a nested network, as requested.

    Attributes:
        name: name of the level, `level1` by default.
        sparsity: share of its maskable weights that are zero, in [0, 1).
        pattern: arrangement of the kept weights; a dense level (sparsity 0) fits every pattern.
        width: share of the channels that it has, in (0, 1].
        depth: share of the skippable blocks that it has, in (0, 1].
        budget: its largest cost; until it is solved, the quantity that it decides is NaN.
    """

    name: str
    sparsity: float
    pattern: Pattern = Pattern()
    width: float = 1.0
    depth: float = 1.0
    budget: Budget | None = None


class _Axis(NamedTuple):
    """One quantity in which levels differ."""

    name: str
    core: str
    full: str
    range: str
    growing: bool

    def holds(self, value: float) -> bool:
        """Return whether a value is in range."""
        return 0 < value <= 1 if self.growing else 0 <= value < 1

    def is_behind(self, lower: float, higher: float) -> bool:
        """Return whether the higher level has less than the lower one."""
        return higher < lower if self.growing else higher > lower


AXES = (
    _Axis("sparsity", "sparsest", "", "[0, 1)", growing=False),
    _Axis("width", "narrowest", "all channels", "(0, 1]", growing=True),
    _Axis("depth", "shallowest", "all blocks", "(0, 1]", growing=True),
)


def check_levels(levels: Sequence[Level | None]) -> list[str]:
    """Return the problems that keep levels (core first) from nesting; empty if there are none.

    Every level must have more than the previous one on one axis (denser, wider or deeper) and not less on
    any; the last one has full width and depth. Patterns must nest: blocks of one shape, N:M with one M. None
    is a level whose own problems are reported elsewhere; it is only counted.
    """
    problems: list[str] = []
    if not 2 <= len(levels) <= MAX_LEVELS:
        problems.append(
            f"{len(levels)} level{'' if len(levels) == 1 else 's'} given; a nested network has "
            f"2 to {MAX_LEVELS}, from the core (sparsest) to the full level"
        )
    numbered = [(k, level) for k, level in enumerate(levels, start=1) if level is not None]
    for axis in AXES:
        problems += _wrong_axis(axis, numbered)
    problems += _equal_levels(numbered) + _falling_budgets(numbered)
    return problems + _wrong_names(numbered) + _wrong_patterns(numbered)


def _wrong_axis(axis: _Axis, numbered: Sequence[tuple[int, Level]]) -> list[str]:
    order = f"levels run from the core ({axis.core}) to the full level"
    values = [(k, float(getattr(level, axis.name)), level) for k, level in numbered]
    values = [entry for entry in values if entry[2].budget is None or not math.isnan(entry[1])]
    problems = [
        f"level[{k}].{axis.name} = {value!r} is not in {axis.range}; {order}{_share_hint(axis, value)}"
        for k, value, _ in values
        if not axis.holds(value)
    ]
    in_range = [(k, value, level) for k, value, level in values if axis.holds(value)]
    if axis.name == "sparsity":
        problems += [
            f"level[{k}].sparsity = {value!r} does not agree with pattern {level.pattern}, "
            f"which is a sparsity of {level.pattern.sparsity:g}; give one of the two"
            for k, value, level in in_range
            if level.pattern.sparsity is not None and abs(value - level.pattern.sparsity) > 1e-9
        ]
    problems += [
        _behind(axis, k, higher, j, lower)
        for (j, lower, _), (k, higher, _) in pairwise(in_range)
        if axis.is_behind(lower, higher)
    ]
    if axis.full and in_range and in_range[-1][0] == numbered[-1][0] and (value := in_range[-1][1]) < 1:
        k = in_range[-1][0]
        problems.append(f"level[{k}].{axis.name} = {value!r} is not 1; the full level has {axis.full}")
    return problems


def _share_hint(axis: _Axis, value: float) -> str:
    meant = share_meant(value)
    return did_you_mean(meant if meant is not None and axis.holds(meant) else None)


def _behind(axis: _Axis, k: int, higher: float, j: int, lower: float) -> str:
    side = "above" if axis.growing else "below"
    return (
        f"level[{k}].{axis.name} = {higher!r} is not {side} level[{j}].{axis.name} = {lower!r}; "
        f"levels run from the core ({axis.core}) to the full level"
    )


def _equal_levels(numbered: Sequence[tuple[int, Level]]) -> list[str]:
    """Return problems of neighbours that are equal on every axis."""
    problems = []
    for (j, lower), (k, higher) in pairwise(numbered):
        one, other = ([getattr(level, axis.name) for axis in AXES] for level in (lower, higher))
        if one == other and all(axis.holds(value) for axis, value in zip(AXES, one, strict=True)):
            axis = next((axis for axis in AXES if axis.growing and getattr(lower, axis.name) < 1), AXES[0])
            problems.append(_behind(axis, k, getattr(higher, axis.name), j, getattr(lower, axis.name)))
    return problems


def _falling_budgets(numbered: Sequence[tuple[int, Level]]) -> list[str]:
    budgets = [(k, level.budget) for k, level in numbered if level.budget is not None]
    return [
        f"level[{k}].budget = {higher} is not above level[{j}].budget = {lower}; levels run from the core to "
        "the full level"
        for (j, lower), (k, higher) in pairwise(budgets)
        if (lower.quantity, lower.is_share) == (higher.quantity, higher.is_share)
        and higher.amount <= lower.amount
    ]


def _wrong_names(numbered: Sequence[tuple[int, Level]]) -> list[str]:
    problems: list[str] = []
    first: dict[str, int] = {}
    for k, level in numbered:
        if not re.fullmatch(r"(?!\d+$)(?!all$)\w[\w.-]{0,63}", level.name):
            problems.append(
                f"level[{k}].name = {level.name!r} is not allowed; use up to 64 letters, digits, '-', '_' "
                "and '.', not a bare number, and not all"
            )
        elif level.name in first:
            problems.append(
                f"level[{k}].name = {level.name!r} is the name of level[{first[level.name]}] already; "
                "give each level its own"
            )
        first.setdefault(level.name, k)
    return problems


def _wrong_patterns(numbered: Sequence[tuple[int, Level]]) -> list[str]:
    sparse = [level.pattern for _, level in numbered if level.sparsity > 0]
    shapes = {(pattern.kind, pattern.m, pattern.rows, pattern.cols): str(pattern) for pattern in sparse}
    narrow = next((k for k, level in numbered if level.width < 1), None)
    blocks = next((str(pattern) for pattern in sparse if pattern.kind == "block"), None)
    if narrow is not None and blocks is not None:
        return [
            f"pattern {blocks} does not go with level[{narrow}].width below 1; narrower levels take "
            "unstructured or N:M"
        ]
    if len(shapes) < 2:
        return []
    return [
        f"patterns {', '.join(shapes.values())} do not nest; sparse levels share one kind: "
        "unstructured, N:M of one M, or blocks of one shape"
    ]
