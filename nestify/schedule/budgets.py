"""Budgets: the sparsity, width or depth at which a level costs as much as its budget allows."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf

from torch import Tensor, nn

from nestify.data.hierarchy import ClassLevels
from nestify.engine.layer_times import LayerTimes
from nestify.errors import RecipeError
from nestify.model.level_sizes import LevelSizes
from nestify.model.nested_model import NestedModel
from nestify.model.spec import ModelSpec, state_tensors
from nestify.model.weight_facts import WeightFacts
from nestify.recipe.amounts import TOLERANCE, Budget, share_meant
from nestify.recipe.level_options import solved_axis
from nestify.recipe.levels import Level, Pattern, check_levels
from nestify.recipe.recipe import Recipe
from nestify.schedule.blocks import Removable, find_removable
from nestify.schedule.channels import channel_counts, channel_path
from nestify.schedule.costs import MacCount, count_macs, level_cost, level_costs
from nestify.schedule.description import prefix_bytes
from nestify.schedule.likeness import group_channels
from nestify.schedule.nest import (
    LevelSize,
    check_distinct,
    check_removable,
    choose_weights,
    measure_if_needed,
    nest,
    order_channels,
    size_level,
)


@dataclass(frozen=True)
class NestedDesign:
    """An untrained nested model, and the levels that it was made for.

    Attributes:
        nested: the model; the weights of its levels are not chosen yet.
        levels: its levels, core first, with their budgets solved.
        removable: channels and blocks of the network that can be left out; None if the schedule only masks
            weights.
        solver: the solver of the budgets, to solve them again when the weights have changed.
    """

    nested: NestedModel
    levels: Sequence[Level]
    removable: Removable | None
    solver: "Solver"

    @property
    def settle(self) -> Callable[[], Sequence[Level]] | None:
        """A function that solves sparsities for their budgets again; None if no level has one."""
        if self.removable is not None or not any(level.budget for level in self.levels):
            return None
        return self.solver.levels  # a method of the solver, so that a copy of the design has its own


def design_levels(
    network: nn.Module,
    spec: ModelSpec,
    recipe: Recipe,
    labels: ClassLevels,
    calibration: Iterable[Tensor],
    known: Removable | None = None,
    given: Callable[[Sequence[Level], Removable | None], Sequence[LevelSize]] | None = None,
    layer_times: Callable[[Sequence[nn.Module]], LayerTimes] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> NestedDesign:
    """Find what can be left out of a network, solve the budgets, and make the nested model.

    Args:
        network: a timm model, which the nested model uses without a copy. If levels are narrower, its
            channels are sorted by importance, and if a block of their pattern has several inputs, like
            channels are moved together; neither changes the logits.
        spec: its description.
        recipe: the levels and the schedule.
        labels: the classes that each level predicts.
        calibration: batches of images (B, C, H, W) on which the importance of blocks is measured, if the
            recipe ranks them by loss, and the sensitivity of weights, if it ranks them by that. Each of the
            two iterates over them from the start.
        known: the result of `find_removable` for a network of the same architecture, to be used again;
            None: the network is searched.
        given: returns the sizes of the first levels, which exist already, for the levels of the recipe and
            what can be left out; None if there are none.
        layer_times: returns the times of a model's layers on this machine, for networks of several widths,
            the narrowest first and the full one last. It is called if a level has a budget of latency.
        warn: called with a sentence if the channels cannot be followed, so that they stay in their order, and
            if weights have no effect on the outputs.

    Raises:
        RecipeError: if levels do not fit the network, or a budget cannot be met.
        UnsupportedModelError: if the network has nothing, or too little, that smaller levels can leave out,
            or a smaller level cannot be made.
    """
    removable = None
    if recipe.schedule.kind != "weight":
        measure = recipe.schedule.rank == "loss" and any(level.depth != 1 for level in recipe.levels)
        removable = find_removable(
            network,
            spec,
            calibration if measure else None,
            known,
            keep_outputs=recipe.schedule.keep_outputs,
        )
        check_removable(spec, recipe.levels, removable)
        if any(level.width != 1 for level in recipe.levels):
            order_channels(network, removable)
    if given is None and (problem := group_channels(network, spec, recipe.levels, removable)):
        warn(problem)
    sizes = () if given is None else tuple(given(recipe.levels, removable))
    count = count_macs(network, spec.input_size)
    times = None
    if any(level.budget is not None and level.budget.quantity == "latency" for level in recipe.levels):
        assert layer_times is not None
        times = layer_times([*_narrower_networks(network, recipe, removable), network])
    facts = WeightFacts(count.by_weight, measure_if_needed(network, spec, recipe, calibration, warn))
    solver = Solver(network, spec, recipe, removable, count, facts, labels, sizes, times)
    solved = solver.sizes()
    nested = nest(network, spec, recipe, removable, solved, labels, facts)
    return NestedDesign(nested, tuple(size.level for size in solved), removable, solver)


MEASURED_WIDTHS = (0.25, 0.5, 0.75)
"""Widths at which layers are measured for budgets of latency; the narrowest and the full one are added."""


def _narrower_networks(network: nn.Module, recipe: Recipe, removable: Removable | None) -> list[nn.Module]:
    """Return the narrower networks whose layers are measured, the narrowest first; none if no level is."""
    if removable is None or all(level.width == 1 for level in recipe.levels):
        return []
    groups, divisor = removable.channels.groups, recipe.schedule.divisor
    levels = [Level(f"{width:g}", 0.0, width=width) for width in MEASURED_WIDTHS]
    (_, narrowest), *_ = channel_path(groups, divisor)
    counts = (narrowest, *channel_counts(groups, levels, divisor))
    sizes = LevelSizes(removable.channels, removable.layers, counts, (frozenset(),) * len(counts))
    tensors = state_tensors(network)
    return [
        sizes.make_network(k, {name: sizes.cut(k, name, tensor) for name, tensor in tensors.items()})
        for k in range(1, len(counts) + 1)
    ]


SPARSITY_STEPS = 10_000
"""Number of sparsities from which a budget chooses."""


@dataclass(frozen=True)
class Solver:
    """A solver of the budgets of one recipe for one network.

    Attributes:
        network: a timm model, not changed; its channels are sorted by importance if levels are narrower.
        spec: its description.
        recipe: the levels and the schedule.
        removable: channels and blocks of the network that can be left out; None if the schedule is `weight`.
        count: MACs of the network.
        facts: what is known about its weights.
        labels: the classes that each level predicts; the nested file stores them.
        given: sizes of the first levels, which exist already.
        times: times of the network's layers; None if no level has a budget of latency.
    """

    network: nn.Module
    spec: ModelSpec
    recipe: Recipe
    removable: Removable | None
    count: MacCount
    facts: WeightFacts
    labels: ClassLevels
    given: Sequence[LevelSize] = ()
    times: LayerTimes | None = None

    def sizes(self) -> list[LevelSize]:
        """Solve the budgets, and return the sizes of the recipe's levels, core first.

        A level gets the largest size that costs at most its budget, if its cost is within 2 % of the budget;
        otherwise the next larger size, if its cost is. If neither is, because the steps of channels are too
        large, other groups of channels, which cost less, grow instead.

        Raises:
            RecipeError: if no size is within 2 % of a budget, with the nearest ones; or if levels do not
                nest.
        """
        recipe, removable = self.recipe, self.removable
        sizes: list[LevelSize] = list(self.given)
        for k, level in list(enumerate(recipe.levels, start=1))[len(sizes) :]:
            size = self._solve(sizes, k, level) if level.budget else size_level(level, recipe, removable)
            sizes.append(size)
        if problems := check_levels([size.level for size in sizes]):  # budgets may be out of order
            raise RecipeError(problems)
        blocks = 0 if removable is None else len(removable.ranking)
        check_distinct(self.spec, sizes, recipe.schedule.divisor, blocks)
        return sizes

    def levels(self) -> list[Level]:
        """Solve the budgets as `sizes` does, and return the levels alone."""
        return [size.level for size in self.sizes()]

    def check(self, nested: NestedModel, levels: Sequence[Level]) -> list[str]:
        """Return a message for each level of a finished model whose cost does not meet its budget.

        Budgets of latency are left out; they are checked by measuring the file.

        Args:
            nested: the finished model.
            levels: its levels, core first.
        """
        return [
            f"level[{k}].budget = {level.budget} was missed: the level costs {_format_cost(cost)}"
            for k, level in enumerate(levels, start=1)
            if level.budget is not None
            and level.budget.quantity != "latency"
            and not _is_met(cost := self._cost(nested, levels, k, level.budget), level.budget)
        ]

    def latencies(self, nested: NestedModel) -> list[float | None]:
        """Return each level's predicted time over the full level's, core first; None without `times`."""
        if self.times is None:
            return [None] * nested.n_levels
        entry = nested.entry_levels
        shares: list[float | None] = []
        for k in range(1, nested.n_levels + 1):
            has = {name: nested.elements(k, name) for name in self.spec.maskable}
            densities = {name: entry.count_kept(k, name) / has[name] for name in entry if has[name]}
            shapes = {
                name: tuple(nested.cut(k, name, nested.shared_tensor(name)).shape) if count else None
                for name, count in has.items()
            }
            shares.append(self.times.share(densities, shapes))
        return shares

    def _solve(self, lower: Sequence[LevelSize], k: int, level: Level) -> LevelSize:
        """Find the size of level `k` by bisection over its possible sizes, none below the level below."""
        budget = level.budget
        assert budget is not None
        axis = solved_axis(self.recipe.schedule.kind)
        sign = -1 if axis == "sparsity" else 1
        least = sign * getattr(lower[-1].level, axis) if lower else -inf
        path = [size for size in self._possible_sizes(level) if sign * getattr(size.level, axis) >= least]
        costs: dict[int, float] = {}

        def cost(index: int) -> float:
            if index not in costs:
                costs[index] = self._cost_of_last([*lower, path[index]], k, budget)
            return costs[index]

        largest = bisect_right(range(len(path)), budget.amount, key=cost) - 1  # -1 if all cost more
        nearest = [index for index in (largest, largest + 1) if 0 <= index < len(path)]
        for index in nearest:
            if _is_met(cost(index), budget):
                return path[index]
        if largest >= 0 and (size := self._grow_groups(path[largest:], lower, k, budget)):
            return size
        costs_text = " or ".join(
            f"{_format_cost(cost(index))} ({axis} {getattr(path[index].level, axis):.4g})"
            for index in nearest
        )
        divisor = self.recipe.schedule.divisor
        finer = f", or set schedule.divisor below {divisor}" if axis == "width" and divisor > 1 else ""
        meant = None if budget.is_share else share_meant(budget.amount)
        hint = "" if meant is None else f"; did you mean {replace(budget, amount=meant, is_share=True)}?"
        raise RecipeError(
            f"level[{k}].budget = {budget} cannot be met within {TOLERANCE:.0%} by {self.spec.architecture}; "
            f"choose the nearest that can be met: {costs_text}{finer}{hint}"
        )

    def _grow_groups(
        self, path: Sequence[LevelSize], lower: Sequence[LevelSize], k: int, budget: Budget
    ) -> LevelSize | None:
        """Find a size between the first two of a path by growing groups in another order; None if none fits.

        Args:
            path: sizes from the largest within the budget to the full one.
            lower: sizes of the levels below.
            k: the level, 1-based.
            budget: its budget.
        """
        size = path[0]
        for group in range(len(size.counts)):
            more = next(
                (step.counts[group] for step in path if step.counts[group] > size.counts[group]), None
            )
            if more is None:
                continue
            grown = replace(size, counts=(*size.counts[:group], more, *size.counts[group + 1 :]))
            cost = self._cost_of_last([*lower, grown], k, budget)
            if _is_met(cost, budget):
                return grown
            if cost < budget.amount:
                size = grown
        return None

    def _possible_sizes(self, level: Level) -> list[LevelSize]:
        """Return the sizes that a level can have, from the smallest to the full one."""
        axis = solved_axis(self.recipe.schedule.kind)
        if axis == "sparsity":
            n = SPARSITY_STEPS
            return [LevelSize(replace(level, sparsity=i / n)) for i in range(n - 1, -1, -1)]
        assert self.removable is not None
        removable, recipe = self.removable, self.recipe
        if axis == "depth":
            n = len(removable.ranking)
            return [size_level(replace(level, depth=kept / n), recipe, removable) for kept in range(1, n + 1)]
        skipped = size_level(replace(level, width=1.0), recipe, removable).skipped
        steps = channel_path(removable.channels.groups, recipe.schedule.divisor)
        return [LevelSize(replace(level, width=width), counts, skipped) for width, counts in steps]

    def _cost_of_last(self, sizes: Sequence[LevelSize], k: int, budget: Budget) -> float:
        """Return the cost of the last of the given levels, level `k`, if all levels above it are full."""
        trial = list(sizes)
        for level in self.recipe.levels[len(sizes) :]:
            full = replace(level, sparsity=0.0, pattern=Pattern(), width=1.0, depth=1.0, budget=None)
            trial.append(size_level(full, self.recipe, self.removable))
        levels = [size.level for size in trial]
        nested = nest(self.network, self.spec, self.recipe, self.removable, trial, self.labels, self.facts)
        choose_weights(nested, levels, self.recipe.schedule.score)
        return self._cost(nested, levels, k, budget)

    def _cost(self, nested: NestedModel, levels: Sequence[Level], k: int, budget: Budget) -> float:
        """Return a level's cost in the quantity of its budget; for a share, divided by the full level's."""
        if budget.quantity == "latency":
            latency = self.latencies(nested)[k - 1]
            assert latency is not None
            return latency

        def amount(k: int) -> float:
            if budget.quantity == "bytes":
                costs = level_costs(nested, self.count)
                return prefix_bytes(self.recipe, levels, nested, costs, self.labels)[k - 1]
            cost = level_cost(nested, k, self.count)
            return cost.effective_macs if budget.quantity == "macs" else cost.nonzero_parameters

        return amount(k) / amount(nested.n_levels) if budget.is_share else amount(k)


def _is_met(cost: float, budget: Budget) -> bool:
    return abs(cost / budget.amount - 1) <= TOLERANCE


def _format_cost(cost: float) -> str:
    return f"{cost:.4g}" if cost < 1 else f"{cost:,.0f}"
