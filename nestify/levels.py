"""Levels and patterns as plain data: what a user asks of each level. No torch here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

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
    if found := re.fullmatch(r"(\d{1,3}):(\d{1,3})", text):
        n, m = int(found[1]), int(found[2])
        if not 1 <= n < m:
            raise ValueError(f"pattern {text!r} keeps {n} of {m}; N:M needs 1 <= N < M")
        return Pattern("n:m", n=n, m=m)
    if found := re.fullmatch(r"(\d{1,4})x(\d{1,4})", text):
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
    """

    name: str
    sparsity: float
    pattern: Pattern = Pattern()


def check_levels(levels: Sequence[Level]) -> list[str]:
    """Problems that keep levels (core first) from nesting; empty where there are none.

    Every level must be at least as dense as the one before, and patterns must nest: blocks of one
    shape, N:M of one M.
    """
    problems: list[str] = []
    if not 2 <= len(levels) <= MAX_LEVELS:
        problems.append(
            f"{len(levels)} level{'' if len(levels) == 1 else 's'} given; a nested network has "
            f"2 to {MAX_LEVELS}, from the core (sparsest) to the full level"
        )
    for k, level in enumerate(levels, start=1):
        if not 0 <= level.sparsity < 1:
            problems.append(
                f"level[{k}].sparsity = {level.sparsity:g} is not in [0, 1); "
                "levels run from the core (sparsest) to the full level"
            )
    for k, (lower, higher) in enumerate(pairwise(levels), start=2):
        if higher.sparsity >= lower.sparsity:
            problems.append(
                f"level[{k}].sparsity = {higher.sparsity:g} is not below level[{k - 1}].sparsity = "
                f"{lower.sparsity:g}; levels run from the core (sparsest) to the full level"
            )
    names = [level.name for level in levels]
    problems += [f"level name {name!r} is used twice" for name in sorted(set(names)) if names.count(name) > 1]
    problems += [
        f"level name {name!r} is not allowed; use letters, digits, '-', '_' and '.', not a bare number"
        for name in names
        if not re.fullmatch(r"(?!\d+$)(?!all$)[\w.-]{1,64}", name)
    ]
    shapes = {
        (level.pattern.kind, level.pattern.m, level.pattern.rows, level.pattern.cols): str(level.pattern)
        for level in levels
        if level.sparsity > 0
    }
    if len(shapes) > 1:
        problems.append(
            f"patterns {', '.join(shapes.values())} do not nest; sparse levels share one kind: "
            "unstructured, N:M of one M, or blocks of one shape"
        )
    return problems
