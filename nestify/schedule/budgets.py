"""Budgets: which sparsity, width or depth makes a level cost what it may."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from nestify.data.hierarchy import ClassLevels
from nestify.errors import RecipeError
from nestify.model.nested_model import NestedModel
from nestify.model.spec import ModelSpec
from nestify.recipe.amounts import TOLERANCE, Budget
from nestify.recipe.level_options import solved_axis
from nestify.recipe.levels import Level, Pattern, check_levels
from nestify.recipe.recipe import Recipe
from nestify.schedule.blocks import Removable, find_removable
from nestify.schedule.channels import channel_path
from nestify.schedule.costs import MacCount, count_macs, level_cost, level_costs
from nestify.schedule.description import prefix_bytes
from nestify.schedule.nest import (
    Size,
    check_distinct,
    check_removable,
    choose_weights,
    nest,
    order_channels,
    size_of,
)


@dataclass(frozen=True)
class Design:
    """What is made of a network before it learns.

    Attributes:
        nested: the model, its weights yet to be chosen. `levels`: its levels, budgets solved.
        removable: what can be left out of the network; None where the schedule masks weights alone.
        solver: which solves the budgets again where the weights have changed.
    """

    nested: NestedModel
    levels: Sequence[Level]
    removable: Removable | None
    solver: "Solver"


def design(
    network: nn.Module,
    spec: ModelSpec,
    recipe: Recipe,
    labels: ClassLevels,
    calibration: Iterable[Tensor],
    known: Removable | None = None,
) -> Design:
    """Find what can be left out of a network, solve the budgets, and make the nested model.

    Args:
        network: taken over. Where levels are narrower, its channels are put in the order of their
            importance, which changes no logit.
        labels: what the levels tell.
        calibration: images (B, C, H, W) that tell what a block is worth, if the recipe wants to know.
        known: what was found for a network of the same architecture, so that it is not searched again.

    Raises:
        RecipeError: if levels do not fit the network, or a budget cannot be met.
        UnsupportedModelError: if a smaller level cannot be made of the network.
    """
    removable = None
    if recipe.schedule.kind != "weight":
        measure = recipe.schedule.rank == "loss" and any(level.depth != 1 for level in recipe.levels)
        removable = find_removable(network, spec, calibration if measure else None, known)
        if any(level.width != 1 for level in recipe.levels):
            order_channels(network, removable)
    solver = Solver(network, spec, recipe, removable, count_macs(network, spec.input_size), labels)
    sizes = solver.sizes()
    nested = nest(network, spec, recipe, removable, sizes, labels)
    return Design(nested, tuple(size.level for size in sizes), removable, solver)


FINENESS = 10_000
"""How many sparsities a budget chooses among."""


@dataclass(frozen=True)
class Solver:
    """Solves the budgets of one recipe for one network.

    Args:
        network: its channels in the order of their importance where levels are narrower; stays as it is.
        spec: its description. `count`: its MACs.
        removable: of the network; None where the schedule is `weight`.
        labels: what the levels tell, which the nested file will hold.
    """

    network: nn.Module
    spec: ModelSpec
    recipe: Recipe
    removable: Removable | None
    count: MacCount
    labels: ClassLevels

    def sizes(self) -> list[Size]:
        """The sizes of the recipe's levels, core first, with their budgets solved.

        A level gets the largest size that costs no more than its budget, if that is within 2 % of it, and
        otherwise the smallest one above it that is. Where steps of channels are too large for that, single
        groups that cost less grow instead.

        Raises:
            RecipeError: if no size is within 2 % of a budget, with the nearest; or if levels do not nest.
            UnsupportedModelError: if there is nothing that can be left out.
        """
        recipe, removable = self.recipe, self.removable
        if removable is not None:
            check_removable(self.spec, recipe.levels, removable)
        sizes: list[Size] = []
        for k, level in enumerate(recipe.levels, start=1):
            size = self._solved(sizes, k, level) if level.budget else size_of(level, recipe, removable)
            sizes.append(size)
        if problems := check_levels([size.level for size in sizes]):  # a budget may lie below a lower level
            raise RecipeError(problems)
        blocks = 0 if removable is None else len(removable.ranking)
        check_distinct(self.spec, sizes, recipe.schedule.divisor, blocks)
        return sizes

    def check(self, nested: NestedModel, levels: Sequence[Level]) -> list[str]:
        """Sentences about the levels of a finished model that cost other than their budgets say."""
        return [
            f"level[{k}].budget = {level.budget} was missed: the level came out at {_shown(cost)}"
            for k, level in enumerate(levels, start=1)
            if level.budget is not None
            and not _fits(cost := self._cost(nested, levels, k, level.budget), level.budget)
        ]

    def _solved(self, lower: Sequence[Size], k: int, level: Level) -> Size:
        budget = level.budget
        assert budget is not None
        path = self._path(level)
        costs: dict[int, float] = {}

        def cost(place: int) -> float:
            if place not in costs:
                costs[place] = self._tried([*lower, path[place]], k, budget)
            return costs[place]

        within = bisect_right(range(len(path)), budget.amount, key=cost) - 1
        near = [place for place in (within, within + 1) if 0 <= place < len(path)]
        for place in near:
            if _fits(cost(place), budget):
                return path[place]
        if within >= 0 and (size := self._filled(path[within:], lower, k, budget)):
            return size
        axis = solved_axis(self.recipe.schedule.kind)
        nearest = " and ".join(
            f"{_shown(cost(place))} ({axis} {getattr(path[place].level, axis):.4g})" for place in near
        )
        divisor = self.recipe.schedule.divisor
        finer = f", or set schedule.divisor below {divisor}" if axis == "width" and divisor > 1 else ""
        raise RecipeError(
            f"level[{k}].budget = {budget} cannot be met within {TOLERANCE:.0%} by {self.spec.architecture}; "
            f"what comes nearest is {nearest}{finer}"
        )

    def _filled(self, path: Sequence[Size], lower: Sequence[Size], k: int, budget: Budget) -> Size | None:
        """A size between the first and the second of a path, by growing other groups than the next one.

        Args:
            path: sizes from the largest within the budget to the full one.
        """
        size = path[0]
        for group in range(len(size.counts)):
            more = next(
                (step.counts[group] for step in path if step.counts[group] > size.counts[group]), None
            )
            if more is None:
                continue
            grown = replace(size, counts=(*size.counts[:group], more, *size.counts[group + 1 :]))
            cost = self._tried([*lower, grown], k, budget)
            if _fits(cost, budget):
                return grown
            if cost < budget.amount:
                size = grown
        return None

    def _path(self, level: Level) -> list[Size]:
        """The sizes that a level can have, from the smallest to the full one."""
        axis = solved_axis(self.recipe.schedule.kind)
        if axis == "sparsity":
            return [Size(replace(level, sparsity=i / FINENESS)) for i in range(FINENESS - 1, -1, -1)]
        assert self.removable is not None
        removable, recipe = self.removable, self.recipe
        if axis == "depth":
            n = len(removable.ranking)
            return [size_of(replace(level, depth=kept / n), recipe, removable) for kept in range(1, n + 1)]
        skipped = size_of(replace(level, width=1.0), recipe, removable).skipped
        steps = channel_path(removable.channels.groups, recipe.schedule.divisor)
        return [Size(replace(level, width=width), counts, skipped) for width, counts in steps]

    def _tried(self, sizes: Sequence[Size], k: int, budget: Budget) -> float:
        """The cost of the last of these levels, were those above it full."""
        tried = list(sizes)
        for level in self.recipe.levels[len(sizes) :]:
            whole = replace(level, sparsity=0.0, pattern=Pattern(), width=1.0, depth=1.0, budget=None)
            tried.append(size_of(whole, self.recipe, self.removable))
        levels = [size.level for size in tried]
        nested = nest(self.network, self.spec, self.recipe, self.removable, tried, self.labels)
        choose_weights(nested, levels, self.recipe.schedule.score)
        return self._cost(nested, levels, k, budget)

    def _cost(self, nested: NestedModel, levels: Sequence[Level], k: int, budget: Budget) -> float:
        """What a level costs of what its budget is about; of a share, over what the full level does."""

        def amount(k: int) -> float:
            if budget.quantity == "bytes":
                costs = level_costs(nested, self.count)
                return prefix_bytes(self.recipe, levels, nested, costs, self.labels)[k - 1]
            cost = level_cost(nested, k, self.count)
            return cost.effective_macs if budget.quantity == "macs" else cost.nonzero_parameters

        return amount(k) / amount(nested.n_levels) if budget.is_share else amount(k)


def _fits(cost: float, budget: Budget) -> bool:
    return abs(cost / budget.amount - 1) <= TOLERANCE


def _shown(cost: float) -> str:
    return f"{cost:.4g}" if cost < 1 else f"{cost:,.0f}"
