"""Make an untrained nested model from a pretrained network and the sizes of its levels."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import Tensor, nn

from nestify.data.hierarchy import ClassLevels
from nestify.errors import RecipeError, UnsupportedModelError
from nestify.model.graph.channel_map import permute_channels
from nestify.model.heads import coarse_rows
from nestify.model.level_sizes import LevelSizes
from nestify.model.nested_model import NestedModel
from nestify.model.spec import ModelSpec, state_tensors
from nestify.model.weight_facts import WeightFacts
from nestify.recipe.level_options import Score
from nestify.recipe.levels import Level
from nestify.recipe.metric import MAP, metric_of_run
from nestify.recipe.recipe import Recipe
from nestify.schedule.blocks import Removable, kept_blocks
from nestify.schedule.channels import channel_counts, importance_orders
from nestify.schedule.frozen import select_around_frozen
from nestify.schedule.sensitivity import Meaning, checked_sensitivity, measure_sensitivity, weigh
from nestify.schedule.weights import divides_into_groups, select_entry_levels


def masked_names(spec: ModelSpec, skip: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the weights that a schedule masks: the maskable ones that are not skipped.

    Args:
        spec: description of the model.
        skip: wildcards over module or parameter names (`*.conv_dw`, `blocks.0.*`), or the words `first`
            (first convolution), `classifier`, `depthwise`.

    Raises:
        RecipeError: if a pattern matches nothing, or no weight is left.
    """
    skipped: set[str] = set()
    problems = []
    for pattern in skip:
        found = _matching_weights(spec, pattern)
        skipped |= found
        if not found:
            modules = sorted({name.rpartition(".")[0] for name in spec.maskable})
            close = get_close_matches(pattern.strip("*."), modules, n=3, cutoff=0.4) or modules[:3]
            problems.append(
                f"schedule.skip = {pattern!r} matches no maskable weight of {spec.architecture}; "
                f"give a layer, such as {', '.join(close)}"
            )
    if problems:
        raise RecipeError(problems)
    names = tuple(name for name in spec.maskable if name not in skipped)
    if not names:
        raise RecipeError(
            f"schedule.skip = {list(skip)} leaves no weight of {spec.architecture} to mask; skip fewer layers"
        )
    return names


def _matching_weights(spec: ModelSpec, pattern: str) -> set[str]:
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
class LevelSize:
    """A level with its channel counts and skipped blocks.

    Attributes:
        level: the requested level, with its budget solved.
        counts: number of units that it has of every group of coupled channels; empty if the schedule only
            masks weights.
        skipped: names of the blocks that it skips.
    """

    level: Level
    counts: tuple[int, ...] = ()
    skipped: frozenset[str] = frozenset()


def size_level(level: Level, recipe: Recipe, removable: Removable | None) -> LevelSize:
    """Find the channel counts and skipped blocks of a level of known width and depth.

    Args:
        level: its width and depth are numbers, not to be solved from a budget.
        recipe: the recipe, for `schedule.divisor`.
        removable: channels and blocks of the network that can be left out; None if the schedule is `weight`.
    """
    if removable is None:
        return LevelSize(level)
    (counts,) = channel_counts(removable.channels.groups, [level], recipe.schedule.divisor)
    kept = kept_blocks(removable.ranking, level.depth)
    return LevelSize(level, counts, frozenset(block.name for block in removable.ranking if block not in kept))


def order_channels(network: nn.Module, removable: Removable) -> None:
    """Sort a network's channels by importance, in place; the logits do not change."""
    groups = removable.channels.groups
    permute_channels(network, removable.channels, importance_orders(groups, state_tensors(network)))


def measure_if_needed(
    network: nn.Module,
    spec: ModelSpec,
    recipe: Recipe,
    images: Iterable[Tensor],
    warn: Callable[[str], None],
) -> Mapping[str, Tensor]:
    """Measure the sensitivity of the weights that the schedule masks, if it ranks them by that.

    Args:
        network: a timm model.
        spec: its description.
        recipe: the recipe.
        images: batches of training images (B, C, H, W).
        warn: called with a sentence if weights have no effect on the outputs.

    Returns:
        As `checked_sensitivity`; empty if it is not needed.
    """
    masked = _masked_at(recipe.levels, spec, recipe)
    if recipe.schedule.score != "fisher" or not masked:
        return {}
    meaning: Meaning = "class" if spec.output == "logits" else "features"
    if metric_of_run(recipe.data) is MAP or (meaning == "class" and spec.num_classes == 1):
        meaning = "labels"
    return checked_sensitivity(measure_sensitivity(network, masked, images, meaning), warn)


def _masked_at(levels: Sequence[Level], spec: ModelSpec, recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the weights that are masked for these levels; none if no level is sparse."""
    sparse = recipe.schedule.kind == "weight" or any(level.sparsity > 0 for level in levels)
    return masked_names(spec, recipe.schedule.skip) if sparse else ()


def nest(
    network: nn.Module,
    spec: ModelSpec,
    recipe: Recipe,
    removable: Removable | None,
    sizes: Sequence[LevelSize],
    labels: ClassLevels,
    facts: WeightFacts,
) -> NestedModel:
    """Make a nested model; the weights of its levels are not chosen yet, see `choose_weights`.

    Args:
        network: a timm model, used without a copy; its channels are sorted by importance if levels are
            narrower.
        spec: its description.
        recipe: the recipe, for `schedule.skip` and `train.bn`.
        removable: channels and blocks of the network that can be left out; None if the schedule is `weight`.
        sizes: sizes of the levels, core first.
        labels: the classes that each level predicts. The initial classifier row of a coarse class is the
            mean of the rows of its classes.
        facts: what is known about the network's weights.

    Raises:
        RecipeError: if `schedule.skip` matches nothing or everything.
        UnsupportedModelError: if a smaller level of the network cannot be made, or its classifier cannot
            predict different classes.
    """
    levels = [size.level for size in sizes]
    level_sizes = None
    if removable is not None:
        nesting = without_shrinking(sizes)
        counts, skipped = tuple(size.counts for size in nesting), tuple(size.skipped for size in nesting)
        level_sizes = LevelSizes(removable.channels, removable.layers, counts, skipped)
    names = [level.name for level in levels]
    nested = NestedModel(
        network,
        spec,
        names,
        masked=_masked_at(levels, spec, recipe),
        bn=recipe.train.bn,
        level_sizes=level_sizes,
        classes=labels.counts(spec.num_classes),
    )
    nested.facts = facts
    for level, parents in labels.parents.items():
        own = nested.own_tensors(level)
        for name in nested.heads:
            full = nested.cut(level, name, nested.shared_tensor(name).detach())
            own[name].data.copy_(coarse_rows(full, parents))
    return nested


def without_shrinking(sizes: Sequence[LevelSize]) -> list[LevelSize]:
    """Return the sizes, core first, each with at least the channels and blocks of the level below.

    Rounding can make a count smaller than that of the level below, and blocks that are ranked again for a
    file that is extended may have another order.
    """
    raised: list[LevelSize] = []
    for size in sizes:
        below = raised[-1] if raised else size
        counts, skipped = tuple(map(max, size.counts, below.counts)), size.skipped & below.skipped
        raised.append(replace(size, counts=counts, skipped=skipped))
    return raised


def check_removable(spec: ModelSpec, levels: Sequence[Level], removable: Removable) -> None:
    """Refuse smaller levels if the network has nothing that they can leave out.

    Raises:
        UnsupportedModelError: if levels are narrower but no channels can be left out, or shallower but no
            blocks can be skipped, or fewer than there are levels that differ in nothing but depth.
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
            f"{spec.architecture} has no residual blocks that can be skipped; use --schedule channel or "
            "--schedule weight, which do not need them"
        )
    only_depth = all(level.width == 1 and level.sparsity == 0 for level in levels)
    most = len(removable.ranking)
    # If there are two levels for one block, the depth or the budget of the lower one is refused later.
    if only_depth and most and len(levels) > max(most, 2):
        blocks = f"{most} block{'s' if most > 1 else ''} that can be skipped"
        differ = f"at most {most} levels can differ in depth" if most > 1 else "no levels can differ in depth"
        fewer = "give fewer levels, or use" if most > 1 else "use"
        raise UnsupportedModelError(
            f"{spec.architecture} has {blocks}, and every level keeps one, so {differ}, and there are "
            f"{len(levels)}; {fewer} --schedule channel or --schedule weight"
        )


def check_distinct(spec: ModelSpec, sizes: Sequence[LevelSize], divisor: int, blocks: int) -> None:
    """Refuse levels that would be the same network as the level above.

    Args:
        spec: description of the model.
        sizes: sizes of the levels, core first.
        divisor: the number that channel counts are multiples of.
        blocks: number of blocks that can be skipped.

    Raises:
        RecipeError: naming the first such level.
    """
    masks = [(size.level.sparsity, str(size.level.pattern)) for size in sizes]
    networks = [
        (size.counts, size.skipped, mask) for size, mask in zip(without_shrinking(sizes), masks, strict=True)
    ]
    for k, (lower, higher) in enumerate(pairwise(networks), start=1):
        if lower != higher:
            continue
        level, above = sizes[k - 1].level, sizes[k].level
        axis, parts, remedy = "width", "channels", f", or a schedule.divisor below {divisor}"
        if level.width == above.width:
            number = f"{blocks} block{'s' if blocks > 1 else ''}"
            axis, parts, remedy = "depth", "blocks", f"; {number} of the model can be skipped"
        raise RecipeError(
            f"level[{k}].{axis} = {getattr(level, axis):g} gives {spec.architecture} the same {parts} as "
            f"level[{k + 1}]; choose {axis}s further apart{remedy}"
        )


def choose_weights(nested: NestedModel, levels: Sequence[Level], score: Score, frozen: int = 0) -> None:
    """Choose the weights of every level at its target sparsity, if the schedule masks any.

    Args:
        nested: the nested model, whose entry levels are replaced.
        levels: its levels, core first.
        score: how weights are ranked.
        frozen: number of levels, from the core on, that keep their weights.
    """
    weights = {name: nested.shared_tensor(name) for name in nested.entry}
    if not weights:
        return
    if score == "fisher":
        weights = weigh(weights, nested.facts.sensitivity)
    available, macs = nested.available(), nested.facts.macs
    if frozen:
        entry = dict(nested.entry.items())
        chosen = select_around_frozen(weights, levels, score, available, entry, frozen, macs)
    else:
        chosen = select_entry_levels(weights, levels, score, available, macs)
    nested.set_entry_levels(chosen)


def dense_layers(nested: NestedModel, levels: Sequence[Level]) -> list[str]:
    """Return the names of the masked weights that an N:M pattern does not divide, so that they stay dense."""
    m = next((level.pattern.m for level in levels if level.pattern.kind == "n:m"), 0)
    if not m:
        return []
    available = nested.available()
    return [n for n, e in nested.entry.items() if not divides_into_groups(tuple(e.shape), m, available[n])]
