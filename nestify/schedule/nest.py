"""From a pretrained network and sizes of its levels to a nested model, before it learns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import nn

from nestify.data.hierarchy import ClassLevels
from nestify.errors import RecipeError, UnsupportedModelError
from nestify.model.graph.channel_map import permute_channels
from nestify.model.heads import coarse_rows
from nestify.model.level_sizes import LevelSizes
from nestify.model.nested_model import NestedModel
from nestify.model.spec import ModelSpec, state_tensors
from nestify.recipe.level_options import Score
from nestify.recipe.levels import Level
from nestify.recipe.recipe import Recipe
from nestify.schedule.blocks import Removable, kept_blocks
from nestify.schedule.channels import channel_counts, importance_orders
from nestify.schedule.weights import select_entry_levels, takes_n_of_m


def masked_names(spec: ModelSpec, skip: Sequence[str]) -> tuple[str, ...]:
    """Names of the weights that a schedule masks: the maskable ones without those left out.

    Args:
        spec: the model.
        skip: wildcards over module or parameter names (`*.conv_dw`, `blocks.0.*`), or the words `first`
            (first convolution), `classifier`, `depthwise`.

    Raises:
        RecipeError: for a pattern that matches nothing, or if nothing is left.
    """
    left_out: set[str] = set()
    problems = []
    for pattern in skip:
        found = _matches(spec, pattern)
        left_out |= found
        if not found:
            modules = sorted({name.rpartition(".")[0] for name in spec.maskable})
            close = get_close_matches(pattern.strip("*."), modules, n=3, cutoff=0.4) or modules[:3]
            problems.append(
                f"schedule.skip = {pattern!r} matches no maskable weight of {spec.architecture}; "
                f"its layers are named like {', '.join(close)}"
            )
    if problems:
        raise RecipeError(problems)
    names = tuple(name for name in spec.maskable if name not in left_out)
    if not names:
        raise RecipeError(f"schedule.skip = {list(skip)} leaves no weight of {spec.architecture} to mask")
    return names


def _matches(spec: ModelSpec, pattern: str) -> set[str]:
    if pattern == "depthwise":
        return set(spec.depthwise)
    layers = {"first": spec.first, "classifier": spec.classifier}.get(pattern)
    if layers is not None:
        return {name for name in spec.maskable if name.startswith(tuple(f"{layer}." for layer in layers))}
    return {
        name
        for name in spec.maskable
        if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
    }


@dataclass(frozen=True)
class Size:
    """One level as it will be.

    Attributes:
        level: what was asked for, its budget solved.
        counts: units of every group of coupled channels that it has; empty where levels differ in neither
            channels nor blocks.
        skipped: names of the blocks that it skips.
    """

    level: Level
    counts: tuple[int, ...] = ()
    skipped: frozenset[str] = frozenset()


def size_of(level: Level, recipe: Recipe, removable: Removable | None) -> Size:
    """What a level of known width and depth has."""
    if removable is None:
        return Size(level)
    (counts,) = channel_counts(removable.channels.groups, [level], recipe.schedule.divisor)
    kept = kept_blocks(removable.ranking, level.depth)
    return Size(level, counts, frozenset(block.name for block in removable.ranking if block not in kept))


def order_channels(network: nn.Module, removable: Removable) -> None:
    """Put a network's channels in the order of their importance, in place, which changes no logit."""
    groups = removable.channels.groups
    permute_channels(network, removable.channels, importance_orders(groups, state_tensors(network)))


def nest(
    network: nn.Module,
    spec: ModelSpec,
    recipe: Recipe,
    removable: Removable | None,
    sizes: Sequence[Size],
    labels: ClassLevels,
) -> NestedModel:
    """Make a nested model whose weights are yet to be chosen; see `choose_weights`.

    Args:
        network: taken over; its channels in the order of their importance where levels are narrower.
        removable: of the network; None where the schedule is `weight`.
        sizes: of the levels, core first.
        labels: what the levels tell. A classifier of coarser classes begins with the mean of its classes'.

    Raises:
        RecipeError: if `schedule.skip` names nothing, or everything.
        UnsupportedModelError: if a smaller level cannot be made of the network, or a level cannot have
            classes of its own.
    """
    levels = [size.level for size in sizes]
    sparse = any(level.sparsity > 0 for level in levels)
    masked = masked_names(spec, recipe.schedule.skip) if sparse or removable is None else ()
    level_sizes = None
    if removable is not None:
        counts = tuple(size.counts for size in nesting(sizes))
        skipped = tuple(size.skipped for size in sizes)
        level_sizes = LevelSizes(removable.channels, removable.layers, counts, skipped)
    names = [level.name for level in levels]
    nested = NestedModel(
        network,
        spec,
        names,
        masked=masked,
        bn=recipe.train.bn,
        level_sizes=level_sizes,
        classes=labels.counts(spec.num_classes),
    )
    for level, parents in labels.parents.items():
        own = nested.own_tensors(level)
        for name in nested.heads:
            full = nested.cut(level, name, nested.shared_tensor(name).detach())
            own[name].data.copy_(coarse_rows(full, parents))
    return nested


def nesting(sizes: Sequence[Size]) -> list[Size]:
    """Sizes of which none has fewer channels than the one below, which rounding may have taken away."""
    found: list[Size] = []
    for size in sizes:
        below = found[-1].counts if found else size.counts
        found.append(replace(size, counts=tuple(map(max, size.counts, below))))
    return found


def check_removable(spec: ModelSpec, levels: Sequence[Level], removable: Removable) -> None:
    """Refuse levels of a network that has nothing to leave out.

    Raises:
        UnsupportedModelError: if levels are narrower and there are no channels, or shallower and there are
            no blocks, that can be left out.
    """
    if any(level.width != 1 for level in levels) and not removable.channels.groups:
        unknown = removable.channels.unknown
        because = f", because of {', '.join(sorted(unknown))}" if unknown else ""
        raise UnsupportedModelError(
            f"{spec.architecture} has no channels that can be left out{because}; --schedule weight works for "
            "every model"
        )
    if any(level.depth != 1 for level in levels) and not removable.ranking:
        raise UnsupportedModelError(
            f"{spec.architecture} has no residual blocks that can be skipped; --schedule channel and "
            "--schedule weight do not need them"
        )


def check_distinct(spec: ModelSpec, sizes: Sequence[Size], divisor: int, blocks: int) -> None:
    """Refuse levels that would be one and the same network.

    Args:
        divisor: of the channels. `blocks`: how many can be skipped.

    Raises:
        RecipeError: naming the first such level.
    """
    kinds = [(size.level.sparsity, str(size.level.pattern)) for size in sizes]
    made = [(size.counts, size.skipped, kind) for size, kind in zip(nesting(sizes), kinds, strict=True)]
    for k, (lower, higher) in enumerate(pairwise(made), start=1):
        if lower != higher:
            continue
        level, above = sizes[k - 1].level, sizes[k].level
        axis, what, remedy = "width", "channels", f", or a schedule.divisor below {divisor}"
        if level.width == above.width:
            axis, what, remedy = "depth", "blocks", f"; it has {blocks} that can be skipped"
        raise RecipeError(
            f"level[{k}].{axis} = {getattr(level, axis):g} gives {spec.architecture} the same {what} as "
            f"level[{k + 1}]; choose {axis}s further apart{remedy}"
        )


def choose_weights(nested: NestedModel, levels: Sequence[Level], score: Score) -> None:
    """Choose the weights of every level at its target, at once; nothing where the schedule masks none."""
    weights = {name: nested.shared_tensor(name) for name in nested.entry}
    if weights:
        nested.set_entry_levels(select_entry_levels(weights, levels, score, nested.available()))


def dense_layers(nested: NestedModel, levels: Sequence[Level]) -> list[str]:
    """Maskable weights that an N:M pattern cannot take, so that they stay whole."""
    m = next((level.pattern.m for level in levels if level.pattern.kind == "n:m"), 0)
    available = nested.available() if m else {}
    return [n for n, e in nested.entry.items() if m and not takes_n_of_m(tuple(e.shape), m, available[n])]
