"""The levels of a recipe: names, quantities and patterns resolved, and all that keeps them from nesting."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from nestify.budgets import parse_budget
from nestify.levels import Level, Pattern, check_levels, parse_pattern
from nestify.recipe_problems import Problem
from nestify.recipe_schedule import Kind, LevelOptions, ScheduleOptions

QUANTITY: Mapping[str, str] = {"weight": "sparsity", "channel": "width", "layer": "depth"}
"""By the kind of schedule: what its levels differ in, and what a bare number in --levels is."""

DEFAULT_LEVELS: Mapping[str, tuple[float, ...]] = {
    "weight": (0.95, 0.8, 0.0),
    "channel": (0.25, 0.5, 1.0),
    "layer": (0.5, 0.75, 1.0),
}
"""By the kind of schedule: sparsities, widths, depths."""

ROUNDED = 0.005  # a sparsity of 0.67 agrees with the pattern 1:3


def resolved_levels(levels: Sequence[LevelOptions], schedule: ScheduleOptions) -> tuple[Level, ...]:
    """The levels of a checked recipe, core first; what a budget is to decide is NaN."""
    found = [resolve(options, k, schedule) for k, options in enumerate(levels, start=1)]
    assert None not in found, "load_recipe lets no level pass that says nothing"
    return tuple(level for level in found if level is not None)


def level_name(options: LevelOptions, k: int) -> str:
    """What level k is called."""
    return f"level{k}" if options.name is None else options.name


def resolve(options: LevelOptions, k: int, schedule: ScheduleOptions) -> Level | None:
    """Level k as data; None where it says nothing of what the schedule needs."""
    pattern = parse_pattern(schedule.pattern) if options.sparsity else Pattern()
    if options.pattern is not None:
        pattern = parse_pattern(options.pattern)
    sparsity, implied = options.sparsity, pattern.sparsity
    if implied is not None and (sparsity is None or abs(sparsity - implied) < ROUNDED):
        sparsity = implied
    given = {"sparsity": sparsity, "width": options.width, "depth": options.depth}
    budget = None if options.budget is None else parse_budget(options.budget)
    if budget is not None:
        free = solved_axis(schedule.kind)
        if given[free] is None:
            given[free] = math.nan
            if free == "sparsity" and options.pattern is None:
                pattern = parse_pattern(schedule.pattern)
    if all(value is None for value in given.values()):
        return None
    return Level(
        level_name(options, k),
        0.0 if given["sparsity"] is None else given["sparsity"],
        pattern,
        1.0 if given["width"] is None else given["width"],
        1.0 if given["depth"] is None else given["depth"],
        budget,
    )


def solved_axis(kind: Kind) -> str:
    """What a budget decides under a kind of schedule; of combined levels it is the width."""
    return QUANTITY.get(kind, "width")


def level_problems(
    levels: Sequence[LevelOptions], schedule: ScheduleOptions, broken: Iterable[str]
) -> list[Problem]:
    """All that keeps levels from nesting, and from going with the schedule.

    Args:
        broken: keys of options that are wrong in themselves, such as `level[1].sparsity`.
    """
    broken = set(broken)
    problems: list[Problem] = []
    found: list[Level | None] = []
    for k, options in enumerate(levels, start=1):
        level = None
        keys = {f"level[{k}].{name}" for name in ("sparsity", "width", "depth", "pattern", "budget")}
        if not broken & {*keys, f"level[{k}]"}:
            level = resolve(options, k, schedule)
            if level is None:
                problems.append(_says_nothing(k, schedule.kind))
        found.append(level)
    if "schedule.pattern" in broken:  # then nobody knows whether the patterns nest
        found = [level and replace(level, pattern=Pattern()) for level in found]
    if "schedule.kind" not in broken:
        for k, options in enumerate(levels, start=1):
            if found[k - 1] is not None:
                problems += _of_other_kind(k, options, found[k - 1], schedule.kind)
    for text in check_levels(found):
        key = re.match(r"level\[\d+\]\.\w+", text)
        problems.append(Problem(key[0] if key else "level", text))
    return problems


def _says_nothing(k: int, kind: Kind) -> Problem:
    key = f"level[{k}].{solved_axis(kind)}"
    also = ', or an N:M pattern such as "2:4", which implies it' if kind == "weight" else ""
    if kind == "combined":
        also = ", or sparsity or depth"
    return Problem(key, f"{key} is not given; set it{also}")


def _of_other_kind(k: int, options: LevelOptions, level: Level | None, kind: Kind) -> list[Problem]:
    """What a level leaves out that its schedule does not, and what a budget is to decide but is given."""
    problems: list[Problem] = []
    assert level is not None
    for other, quantity in QUANTITY.items():
        value = getattr(level, quantity)
        is_full = value == (0 if quantity == "sparsity" else 1)
        if kind not in (other, "combined") and not is_full:
            own, example = QUANTITY[kind], ",".join(f"{value:g}" for value in DEFAULT_LEVELS[kind])
            problems.append(
                Problem(
                    f"level[{k}].{quantity}",
                    f'level[{k}].{quantity} = {value:g} needs schedule.kind = "{other}" or "combined"; with '
                    f'"{kind}" a level has a {own}, as in --levels {example}',
                )
            )
    free = solved_axis(kind)
    if options.budget is not None and not math.isnan(getattr(level, free)):
        text = f"level[{k}].budget = {options.budget} is to decide level[{k}].{free}; give one of the two"
        problems.append(Problem(f"level[{k}].budget", text))
    return problems
