"""The sections of a recipe that define levels, [schedule] and [[level]]. Does not import torch."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from nestify.recipe.amounts import BUDGET_FORM, parse_budget
from nestify.recipe.flags import Flag, Panel
from nestify.recipe.levels import (
    COMMON_PATTERN_FORM,
    PATTERN_FORM,
    Level,
    Pattern,
    check_levels,
    parse_pattern,
)
from nestify.recipe.options import Section, Share, Text, in_schema
from nestify.recipe.problems import Problem
from nestify.recipe.stages import training_stages

Score = Literal["fisher", "lamp", "magnitude", "per_mac", "uniform", "erk"]
Kind = Literal["weight", "channel", "layer", "combined"]
Part = Literal["weight", "channel", "layer"]
"""What a level can leave out: weights, channels, blocks."""
Rank = Literal["evenly", "loss"]

LONG_RUN_RAMP = 0.5
"""Share of a long training during which sparsity increases, unless the recipe says otherwise."""

LONG_RUN_STEPS = 600
"""Steps of nested training from which on sparsity increases gradually; a shorter one starts at its target."""


def _pattern(text: str) -> str:
    try:
        parse_pattern(text)
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"pattern {text!r} ")) from None
    return text


def _common_pattern(text: str) -> str:
    if parse_pattern(text).kind == "n:m":
        raise ValueError(f'is N:M, which sets one level\'s sparsity; give it per level: pattern = "{text}"')
    return text


def _budget(text: str) -> str:
    try:
        parse_budget(text)
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"budget {text!r} ")) from None
    return text


PatternText = Annotated[str, AfterValidator(_pattern), in_schema(pattern=PATTERN_FORM)]


class ScheduleOptions(Section):
    """[schedule]: which weights enter at which level."""

    kind: Annotated[Kind, Flag(Panel.levels, "--schedule")] = Field(
        default="weight",
        description="what levels leave out, and what the values of --levels are: weight (sparsities), "
        "channel (widths), layer (depths), or combined (set by each [[level]])",
    )
    divisor: int = Field(
        default=8,
        ge=1,
        description="channel counts of narrower levels are multiples of this, where the layer allows it",
    )
    keep_outputs: bool = Field(
        default=False,
        description="whether all levels of a backbone return feature maps of the same channels, for a neck "
        "that cannot change; the outputs of a classifier are its classes, which all levels have",
        exclude_if=lambda keep: not keep,
    )
    rank: Rank = Field(
        default="evenly",
        description="which blocks a shallower level keeps: evenly (spread over the stages) or loss (those "
        "whose removal changes the outputs on training images most)",
    )
    score: Annotated[Score, Flag(Panel.levels, "--score --criterion")] = Field(
        default="fisher",
        description="how weights are ranked: fisher across all layers by their effect on the outputs, "
        "measured on training images, lamp or magnitude across all layers, per_mac across all layers by "
        "importance per multiply-accumulate, uniform or erk within each layer",
    )
    pattern: Annotated[
        PatternText,
        AfterValidator(_common_pattern),
        in_schema(pattern=COMMON_PATTERN_FORM),
        Flag(Panel.levels),
    ] = Field(
        default="unstructured",
        description="arrangement of a sparse level's weights: unstructured, or blocks such as 32x1 "
        "(output x input channels)",
    )
    skip: Annotated[tuple[Text, ...], Field(strict=False), Flag(Panel.levels)] = Field(
        default=(),
        description="weights that stay dense in every level: names or wildcards of modules or parameters, "
        "or first, classifier, depthwise",
    )
    ramp: Share | None = Field(
        default=None,
        description="share of the training during which sparsity increases; by default "
        f"{LONG_RUN_RAMP:g}, or 0 for fewer than {LONG_RUN_STEPS} steps of nested training",
    )
    reselect: int = Field(
        default=40, ge=1, description="number of times that weights are selected again during the ramp"
    )
    fit: bool = Field(
        default=True,
        description="whether the weights of levels without training are refitted by least squares, to bring "
        "each layer's outputs back to the original network's; training starts from the original weights",
    )
    fit_images: int = Field(
        default=256,
        ge=2,
        description="number of training images that the weights are refitted on; fewer if they are larger "
        "than 181 x 181 pixels",
    )


_PARTIAL = in_schema(exclusiveMinimum=0, maximum=1)


class LevelOptions(Section):
    """[[level]]: one level; the first is the core (sparsest), the last the full level."""

    name: str | None = Field(default=None, description="name of the level; level1, level2, ... by default")
    sparsity: Annotated[float, in_schema(minimum=0, exclusiveMaximum=1)] | None = Field(
        default=None,
        description="share of the maskable weights that are zero, in [0, 1); an N:M pattern implies it",
    )
    width: Annotated[float, Field(allow_inf_nan=False), _PARTIAL] | None = Field(
        default=None, description="share of the channels that the level has, in (0, 1]; 1 by default"
    )
    depth: Annotated[float, Field(allow_inf_nan=False), _PARTIAL] | None = Field(
        default=None,
        description="share of the skippable blocks that the level has, in (0, 1]; 1 by default",
    )
    budget: Annotated[Text, AfterValidator(_budget), in_schema(pattern=BUDGET_FORM)] | None = Field(
        default=None,
        description="cost that the level may have, given instead: macs=0.25 (a share of the full level's), "
        "macs=100M, params=2M, bytes=4MB, latency=0.3 (time on the sparse engine)",
    )
    pattern: PatternText | None = Field(
        default=None,
        description="arrangement of the level's weights: unstructured, N:M or RxC; schedule.pattern by "
        "default",
    )
    classes: Text | None = Field(
        default=None,
        description="column of data.hierarchy with the classes that the level predicts; if no level names "
        "one, the core level predicts the coarsest classes, the next level the next finer ones, and the full "
        "level the data's own",
    )
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="relative weight in the loss, scaled so that all weights sum to 1; a level with weight 0 "
        "is not trained; by default evenly spaced from 2 for the core level to 1 for the full level",
    )
    distill: Share | None = Field(
        default=None, description="share of distillation in the level's loss; train.distill by default"
    )
    freeze: bool = Field(
        default=False,
        description="whether this level and those below are trained first, without the higher levels, which "
        "then learn around them",
        exclude_if=lambda freeze: not freeze,
    )


def level_weights(levels: Sequence[LevelOptions]) -> list[float]:
    """Return the relative weights of levels in the loss, core first: given ones, or defaults."""
    steps = max(1, len(levels) - 1)
    usual = [2 - number / steps if len(levels) > 1 else 1.0 for number in range(len(levels))]
    return [
        place if level.weight is None else level.weight for level, place in zip(levels, usual, strict=True)
    ]


QUANTITY: Mapping[str, str] = {"weight": "sparsity", "channel": "width", "layer": "depth"}
"""By kind of schedule: what its levels differ in, and what a plain number in --levels means."""

DEFAULT_LEVELS: Mapping[str, tuple[float, ...]] = {
    "weight": (0.95, 0.8, 0.0),
    "channel": (0.25, 0.5, 1.0),
    "layer": (0.5, 0.75, 1.0),
}
"""By the kind of schedule: sparsities, widths, depths."""

ROUNDED = 0.005  # a sparsity of 0.67 agrees with the pattern 1:3


def resolved_levels(levels: Sequence[LevelOptions], schedule: ScheduleOptions) -> tuple[Level, ...]:
    """Return the levels of a checked recipe, core first; a quantity that a budget decides is NaN."""
    found = [resolve(options, k, schedule) for k, options in enumerate(levels, start=1)]
    assert None not in found, "load_recipe lets no level pass that says nothing"
    return tuple(level for level in found if level is not None)


def level_name(options: LevelOptions, k: int) -> str:
    """Return the name of level k."""
    return f"level{k}" if options.name is None else options.name


def resolve(options: LevelOptions, k: int, schedule: ScheduleOptions) -> Level | None:
    """Return level k as data; None if it lacks what the schedule needs."""
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
    """Return what a budget decides under a kind of schedule; the width of combined levels."""
    return QUANTITY.get(kind, "width")


def level_problems(
    levels: Sequence[LevelOptions], schedule: ScheduleOptions, broken: Iterable[str]
) -> list[Problem]:
    """Return all problems of levels that do not nest or do not fit the schedule.

    Args:
        levels: the levels, core first.
        schedule: the schedule.
        broken: keys of options that are invalid by themselves, such as `level[1].sparsity`.
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
    if "schedule.pattern" in broken:  # then it is not known whether the patterns nest
        found = [level and replace(level, pattern=Pattern()) for level in found]
    if "schedule.kind" not in broken:
        for k, options in enumerate(levels, start=1):
            if found[k - 1] is not None:
                problems += _of_other_kind(k, options, found[k - 1], schedule.kind)
    problems += _freeze_problems(levels, schedule, broken)
    for text in check_levels(found):
        key = re.match(r"level\[\d+\]\.\w+", text)
        problems.append(Problem(key[0] if key else "level", text))
    return problems


def _freeze_problems(
    levels: Sequence[LevelOptions], schedule: ScheduleOptions, broken: Iterable[str]
) -> list[Problem]:
    """Return problems of levels that are to be frozen while others are trained."""
    problems: list[tuple[int, str]] = []
    if levels and levels[-1].freeze:
        problems.append((len(levels), "has no level above it; leave it out"))
    for stage in training_stages(levels):
        trained = levels[stage.frozen : stage.last]
        if stage.last < len(levels) and all(level.weight == 0 for level in trained):
            problems.append(
                (stage.last, "would freeze levels that weight = 0 leaves untrained; give one a weight")
            )
        if stage.frozen and all(level.weight == 0 for level in trained):
            problems.append(
                (stage.frozen, "leaves nothing to train above it, where every level has weight = 0")
            )
    budget = next((k for k, level in enumerate(levels, start=1) if level.budget is not None), None)
    frozen = next((k for k, level in enumerate(levels, start=1) if level.freeze), None)
    if frozen is not None and budget is not None and schedule.kind in ("weight", "combined"):
        problems.append(
            (
                frozen,
                f"does not go with level[{budget}].budget, which is solved for all levels; give sparsities",
            )
        )
    keys = [(f"level[{k}].freeze", text) for k, text in problems]
    return [Problem(key, f"{key} = true {text}") for key, text in keys if key not in broken]


def _says_nothing(k: int, kind: Kind) -> Problem:
    key = f"level[{k}].{solved_axis(kind)}"
    also = ', or an N:M pattern such as "2:4", which implies it' if kind == "weight" else ""
    if kind == "combined":
        also = ", or sparsity or depth"
    return Problem(key, f"{key} is not given; set it{also}")


def _of_other_kind(k: int, options: LevelOptions, level: Level | None, kind: Kind) -> list[Problem]:
    """Return options of a level that its schedule does not use, or that a budget decides but are given."""
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
