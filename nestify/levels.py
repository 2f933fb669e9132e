"""Levels and patterns as plain data: what a user asks of each level. No torch here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

_ORDER = "levels run from the core (sparsest) to the full level"
MAX_LEVELS = 254  # entry levels are stored as uint8, and n + 1 means "no level uses it"


@dataclass(frozen=True)
class Pattern:
    """How the kept weights of a layer may lie.

    Attributes:
        kind: `unstructured`: each weight by itself. `n:m`: in every group of m consecutive input
            channels at most n weights are kept. `block`: blocks of rows x cols (output x input
            channels, at each kernel position) are kept or dropped whole.
        n, m: of `n:m`, 0 elsewhere.
        rows, cols: of `block`, 1 elsewhere.
    """

    kind: Literal["unstructured", "n:m", "block"] = "unstructured"
    n: int = 0
    m: int = 0
    rows: int = 1
    cols: int = 1

    @property
    def sparsity(self) -> float | None:
        """The sparsity that `n:m` sets; None where the pattern leaves it open."""
        return 1 - self.n / self.m if self.kind == "n:m" else None

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.n}:{self.m}"
        return f"{self.rows}x{self.cols}" if self.kind == "block" else self.kind


def parse_pattern(text: str) -> Pattern:
    """Read `unstructured`, `N:M` (as in `2:4`) or `RxC` (as in `32x1`).

    Raises:
        ValueError: if the text is none of these.
    """
    if text == "unstructured":
        return Pattern()
    if found := re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", text):
        n, m = int(found[1]), int(found[2])
        if not 1 <= n < m:
            raise ValueError(f"pattern {text!r} keeps {n} of {m}; N:M needs 1 <= N < M")
        return Pattern("n:m", n=n, m=m)
    if found := re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", text):
        rows, cols = int(found[1]), int(found[2])
        if rows < 1 or cols < 1 or rows * cols < 2:
            raise ValueError(f"pattern {text!r} is not a block; RxC needs at least two weights")
        return Pattern("block", rows=rows, cols=cols)
    raise ValueError(f"pattern {text!r} is not one of unstructured, N:M (2:4) or RxC (32x1)")


@dataclass(frozen=True)
class Level:
    """One level of a nested network, as asked for.

    Attributes:
        name: what users call it, `level1` where they gave no name.
        sparsity: share of the maskable weights that are zero, in [0, 1).
        pattern: how the kept weights may lie. A dense level (sparsity 0) fits every pattern.
        width: share of the channels that it has, in (0, 1].
    """

    name: str
    sparsity: float
    pattern: Pattern = Pattern()
    width: float = 1.0


def check_levels(levels: Sequence[Level | None]) -> list[str]:
    """Problems that keep levels (core first) from nesting; empty where there are none.

    Every level must be denser or wider than the one before, and neither sparser nor narrower; patterns
    must nest: blocks of one shape, N:M of one M. None stands for a level whose own problems are told
    elsewhere: it only counts.
    """
    problems: list[str] = []
    if not 2 <= len(levels) <= MAX_LEVELS:
        problems.append(
            f"{len(levels)} level{'' if len(levels) == 1 else 's'} given; a nested network has "
            f"2 to {MAX_LEVELS}, from the core (sparsest) to the full level"
        )
    numbered = [(k, level) for k, level in enumerate(levels, start=1) if level is not None]
    problems += _wrong_sparsities(numbered) + _wrong_widths(numbered)
    return problems + _wrong_names(numbered) + _wrong_patterns(numbered)


def _wrong_sparsities(numbered: Sequence[tuple[int, Level]]) -> list[str]:
    out_of_range = [
        f"level[{k}].sparsity = {level.sparsity!r} is not in [0, 1); {_ORDER}"
        for k, level in numbered
        if not 0 <= level.sparsity < 1
    ]
    in_range = [(k, level) for k, level in numbered if 0 <= level.sparsity < 1]
    disagreeing = [
        f"level[{k}].sparsity = {level.sparsity!r} does not agree with pattern {level.pattern}, "
        f"which is a sparsity of {level.pattern.sparsity:g}; give one of the two"
        for k, level in in_range
        if level.pattern.sparsity is not None and abs(level.sparsity - level.pattern.sparsity) > 1e-9
    ]
    not_falling = [
        f"level[{k}].sparsity = {higher.sparsity!r} is not below level[{j}].sparsity = "
        f"{lower.sparsity!r}; {_ORDER}"
        for (j, lower), (k, higher) in pairwise(in_range)
        if higher.sparsity > lower.sparsity or (lower.width == 1 and _same(lower, higher))
    ]
    return out_of_range + disagreeing + not_falling


def _same(lower: Level, higher: Level) -> bool:
    return (lower.sparsity, lower.width) == (higher.sparsity, higher.width)


def _wrong_widths(numbered: Sequence[tuple[int, Level]]) -> list[str]:
    order = "levels run from the core (narrowest) to the full level"
    out_of_range = [
        f"level[{k}].width = {level.width!r} is not in (0, 1]; {order}"
        for k, level in numbered
        if not 0 < level.width <= 1
    ]
    in_range = [(k, level) for k, level in numbered if 0 < level.width <= 1]
    not_rising = [
        f"level[{k}].width = {higher.width!r} is not above level[{j}].width = {lower.width!r}; {order}"
        for (j, lower), (k, higher) in pairwise(in_range)
        if higher.width < lower.width or (lower.width < 1 and _same(lower, higher))
    ]
    last = [
        f"level[{k}].width = {level.width!r} is not 1; the full level has all channels"
        for k, level in in_range[-1:]
        if level.width < 1 and k == numbered[-1][0]
    ]
    return out_of_range + not_rising + last


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
    if len(shapes) < 2:
        return []
    return [
        f"patterns {', '.join(shapes.values())} do not nest; sparse levels share one kind: "
        "unstructured, N:M of one M, or blocks of one shape"
    ]
