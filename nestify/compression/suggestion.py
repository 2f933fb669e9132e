"""A recipe for a budget: the schedule whose core level agrees most with the original model untrained."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

from torch import nn

from nestify.compression.candidates import Change, Measured
from nestify.compression.inputs import Inputs
from nestify.compression.latency import LayerTimer
from nestify.compression.untrained import Untrained
from nestify.data.loaders import Loader, Pictures
from nestify.errors import NestifyError, RecipeError
from nestify.recipe.amounts import parse_budget
from nestify.recipe.level_options import DEFAULT_LEVELS, Kind
from nestify.recipe.recipe import Recipe, checked_recipe
from nestify.recipe.toml import recipe_toml
from nestify.schedule.budgets import design_levels
from nestify.training.distributed import SINGLE
from nestify.training.observer import Observer

SCHEDULES: Mapping[Kind, str] = {"weight": "per_mac", "channel": "lamp", "layer": "lamp"}
"""The schedules that are tried, and the score that ranks their weights."""

SENSITIVE = 10.0
"""A layer stays dense in a second attempt if its divergence is above the median's by this factor."""


@dataclass(frozen=True)
class Attempt:
    """Levels of one schedule for a budget.

    Attributes:
        schedule: weight, channel or layer.
        skip: weights that stay dense.
        measured: how the core level's predictions compare with the original model's; None if it was refused.
        refused: why the budget cannot be met; empty if it can.
    """

    schedule: Kind
    skip: tuple[str, ...]
    measured: Measured | None
    refused: str = ""


@dataclass(frozen=True)
class Suggestion:
    """The best of several attempts.

    Attributes:
        budget: the budget of the core level, such as `macs=0.5`.
        tried: all attempts.
        best: the attempt whose core level agrees most with the original model.
        recipe: its recipe, as TOML.
    """

    budget: str
    tried: Sequence[Attempt]
    best: Attempt
    recipe: str


def check_budget(budget: str) -> None:
    """Check the text of a budget.

    Raises:
        RecipeError: with what a budget looks like.
    """
    try:
        parse_budget(budget)
    except ValueError as error:
        raise RecipeError(f"--budget {budget}: {error}; give macs=0.5, params=2M or bytes=4MB") from None


def try_schedules(
    inputs: Inputs,
    network: nn.Module,
    budget: str,
    measure: Callable[[nn.Module], Measured],
    batches: Callable[[], Loader],
    observer: Observer,
) -> list[Attempt]:
    """Try each schedule for a budget.

    Args:
        inputs: the opened inputs.
        network: the original network.
        budget: the budget of the core level.
        measure: compares a network with the original one.
        batches: returns the training images, shuffled.
        observer: notified of each attempt.

    Raises:
        RecipeError: if no schedule can meet the budget, with the reason of each.
    """
    tried = []
    for schedule in SCHEDULES:
        observer.stage(f"trying schedule {schedule} for {budget}")
        tried.append(_try(inputs, network, budget, schedule, (), measure, batches, observer))
    if all(attempt.measured is None for attempt in tried):
        about = f"level[1].budget = {budget} "  # what the budget is called in the recipes that were tried
        raise RecipeError(
            [f"--budget {budget}, {x.schedule} levels: {x.refused.removeprefix(about)}" for x in tried]
        )
    return tried


def suggest(
    inputs: Inputs,
    network: nn.Module,
    budget: str,
    tried: Sequence[Attempt],
    changes: Sequence[Change],
    measure: Callable[[nn.Module], Measured],
    batches: Callable[[], Loader],
    observer: Observer,
) -> Suggestion:
    """Return the recipe of the best schedule for a budget; sparse levels are tried with dense layers too.

    Args:
        tried: what `try_schedules` returned, whose arguments the others are.
        changes: what `scan` measured, from which layers are chosen that stay dense.
    """
    weight, *others = tried
    tried = [weight]
    if skip := _sensitive(changes):
        observer.stage(f"trying schedule weight for {budget} with dense layers")
        tried.append(_try(inputs, network, budget, "weight", skip, measure, batches, observer))
    tried += others
    best = max((attempt for attempt in tried if attempt.measured is not None), key=_quality)
    return Suggestion(
        budget,
        tried,
        best,
        recipe_toml(_recipe(inputs.recipe, budget, best.schedule, best.skip), defaults=False),
    )


def _quality(attempt: Attempt) -> tuple[float, float]:
    assert attempt.measured is not None
    return attempt.measured.agreement, -attempt.measured.divergence


def _sensitive(changes: Sequence[Change]) -> tuple[str, ...]:
    """Return the layers that lose far more than the others at the largest sparsity."""
    sparse = [change for change in changes if change.kind == "weight"]
    most = max((change.amount for change in sparse), default=0.0)
    last = [change for change in sparse if change.amount == most]
    divergences = sorted(change.measured.divergence for change in last)
    if not divergences:
        return ()
    limit = SENSITIVE * divergences[len(divergences) // 2]
    return tuple(change.name for change in last if change.measured.divergence > limit)


def _recipe(recipe: Recipe, budget: str, schedule: Kind, skip: Sequence[str]) -> Recipe:
    full = DEFAULT_LEVELS[schedule][-1]
    table = recipe.to_dict()
    del table["level"]
    return checked_recipe(
        table,
        "",
        {
            "levels": f"{budget},{full:g}",
            "schedule.kind": schedule,
            "schedule.score": SCHEDULES[schedule],
            "schedule.skip": list(dict.fromkeys([*recipe.schedule.skip, *skip])),
        },
    )


def _try(
    inputs: Inputs,
    network: nn.Module,
    budget: str,
    schedule: Kind,
    skip: tuple[str, ...],
    measure: Callable[[nn.Module], Measured],
    batches: Callable[[], Loader],
    observer: Observer,
) -> Attempt:
    try:
        recipe = _recipe(inputs.recipe, budget, schedule, skip)
        timer = partial(LayerTimer(inputs.pretrained.spec, recipe, SINGLE).measure, observer)
        copied, spec = deepcopy(network), inputs.pretrained.spec
        design = design_levels(
            copied, spec, recipe, inputs.labels, Pictures(batches()), layer_times=timer, warn=observer.warned
        )
        parents = inputs.labels.parents
        Untrained(recipe, inputs.metric, batches, Observer(), parents).make(design.nested, design.levels)
    except NestifyError as error:
        return Attempt(schedule, skip, None, str(error))
    return Attempt(schedule, skip, measure(design.nested.at_level(1)))
