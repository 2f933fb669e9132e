"""The sections of a recipe that say what levels are, [schedule] and [[level]]. No torch."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from nestify.budgets import parse_budget
from nestify.levels import parse_pattern
from nestify.recipe_flags import Flag, Panel
from nestify.recipe_sections import Section, Share, Text

Score = Literal["lamp", "magnitude", "uniform", "erk"]
Kind = Literal["weight", "channel", "layer", "combined"]
Rank = Literal["evenly", "loss"]


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


PatternText = Annotated[str, AfterValidator(_pattern)]


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
    rank: Rank = Field(
        default="evenly",
        description="which blocks a shallower level keeps: evenly (spread over the stages) or loss (those "
        "whose removal increases the loss on training images most)",
    )
    score: Annotated[Score, Flag(Panel.levels, "--score --criterion")] = Field(
        default="lamp",
        description="how weights are ranked: lamp or magnitude across all layers, uniform or erk within each "
        "layer",
    )
    pattern: Annotated[PatternText, AfterValidator(_common_pattern), Flag(Panel.levels)] = Field(
        default="unstructured",
        description="arrangement of a sparse level's weights: unstructured, or blocks such as 32x1 "
        "(output x input channels)",
    )
    skip: Annotated[tuple[Text, ...], Field(strict=False), Flag(Panel.levels)] = Field(
        default=(),
        description="weights that stay dense in every level: names or wildcards of modules or parameters, "
        "or first, classifier, depthwise",
    )
    ramp: Share = Field(default=0.5, description="share of the training during which sparsity increases")
    reselect: int = Field(
        default=40, ge=1, description="number of times that weights are selected again during the ramp"
    )


class LevelOptions(Section):
    """[[level]]: one level; the first is the core (sparsest), the last the full level."""

    name: str | None = Field(default=None, description="name of the level; level1, level2, ... by default")
    sparsity: float | None = Field(
        default=None,
        description="share of the maskable weights that are zero, in [0, 1); an N:M pattern implies it",
    )
    width: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        default=None, description="share of the channels that the level has, in (0, 1]; 1 by default"
    )
    depth: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        default=None,
        description="share of the skippable blocks that the level has, in (0, 1]; 1 by default",
    )
    budget: Annotated[Text, AfterValidator(_budget)] | None = Field(
        default=None,
        description="cost that the level may have, given instead: macs=0.25 (a share of the full level's), "
        "macs=100M, params=2M, bytes=4MB",
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


def level_weights(levels: Sequence[LevelOptions]) -> list[float]:
    """Relative weights of levels in the loss, core first: their own, or those of their place."""
    steps = max(1, len(levels) - 1)
    usual = [2 - number / steps if len(levels) > 1 else 1.0 for number in range(len(levels))]
    return [
        place if level.weight is None else level.weight for level, place in zip(levels, usual, strict=True)
    ]
