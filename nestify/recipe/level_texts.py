"""Levels as users write them in one text: `0.95,0.8,0`, `1:4,2:4,0`, `macs=0.25,1`. Does not import torch."""

import re
from collections.abc import Sequence
from typing import Any

from nestify.recipe.amounts import LEAST_PERCENTAGE, share_meant
from nestify.recipe.level_options import DEFAULT_LEVELS, QUANTITY
from nestify.recipe.problems import Problem, format_toml

_PLAIN_NUMBER = r"[0-9]*\.?[0-9]+"


def parse_levels(levels: object, kind: str) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Turn `0.95,0.8,0`, `1:4,2:4,0` or `macs=0.25,1`, or a list of such values, into [[level]] tables.

    Args:
        levels: a text or a list, as users write them.
        kind: kind of the schedule, which decides what a plain number means.
    """
    items = levels.split(",") if isinstance(levels, str) else levels
    quantity = "sparsity" if kind not in (*QUANTITY, "combined") else QUANTITY.get(kind)
    tables: list[dict[str, Any]] = []
    wrong: list[str] = []
    texts = [str(item).strip() for item in (items if isinstance(items, list | tuple) else [items])]
    for text in texts:
        try:
            tables.append(_parse_level(text, quantity))
        except ValueError:
            wrong.append(format_toml(text))
    if (meant := _levels_meant(texts, quantity)) is not None:
        shares = {"sparsity": "sparsities", None: "shares"}.get(quantity, f"{quantity}s")
        problem = (
            f"levels = {','.join(texts)} has percentages, but {shares} run from 0 to 1; did you mean {meant}?"
        )
        return tables, [Problem("level", problem)]
    if not wrong:
        return _with_full(tables, kind), []
    if quantity is None:
        expected = "a budget (macs=0.5); give combined levels as [[level]] sections of a recipe"
        return tables, [Problem("level", f"levels has {', '.join(wrong)}, not {expected}")]
    example = ",".join(f"{value:g}" for value in DEFAULT_LEVELS.get(kind, DEFAULT_LEVELS["weight"]))
    form, blocks = f"a {quantity} (0.5)", ""
    if quantity == "sparsity":
        form, blocks = "a sparsity (0.8), N:M (2:4)", ", and blocks as schedule.pattern"
    problem = (
        f"levels has {', '.join(wrong)}, not {form} or budget (macs=0.5); give the levels from the core to "
        f"the full level, as in {example}{blocks}"
    )
    return tables, [Problem("level", problem)]


def _levels_meant(texts: Sequence[str], quantity: str | None) -> str | None:
    """Return `0.95,0.8,0` for `95,80,0` and for `95%,80%,0%`; None if these are no percentages.

    Numbers without a sign are percentages if none of them is between 0 and 1, and the largest is one.
    """
    numbers = [float(text) for text in texts if re.fullmatch(_PLAIN_NUMBER, text)]
    all_percent = max(numbers, default=0.0) >= LEAST_PERCENTAGE and not any(
        0 < number < 1 for number in numbers
    )
    meant = []
    for text in texts:
        share = None
        if text.endswith("%") or (all_percent and re.fullmatch(_PLAIN_NUMBER, text)):
            share = share_meant(text if text.endswith("%") else f"{text}%")
            if share is None or not (0 < share <= 1 if quantity in ("width", "depth") else 0 <= share < 1):
                return None
        meant.append(text if share is None else f"{share:.6g}")
    return ",".join(meant) if meant != list(texts) else None


def _with_full(tables: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Make a 1 after budgets the full level, under every schedule."""
    if any("budget" in table for table in tables) and kind == "weight" and tables[-1] == {"sparsity": 1.0}:
        return [*tables[:-1], {"sparsity": 0.0}]
    return tables


def _parse_level(text: str, quantity: str | None) -> dict[str, Any]:
    if "=" in text:
        return {"budget": text}
    if ":" in text:
        return {"pattern": text}
    if quantity is None and text == "1":
        return {"width": 1.0, "depth": 1.0, "sparsity": 0.0}
    if quantity is None:
        raise ValueError
    return {quantity: float(text)}
