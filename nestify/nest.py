"""From a pretrained network and a recipe to a nested model, before it learns."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from nestify.channels.axes import permute_channels
from nestify.channels.channel_map import ChannelMap
from nestify.errors import RecipeError, UnsupportedModelError
from nestify.levels import Level
from nestify.model_spec import ModelSpec, state_tensors
from nestify.nested_model import NestedModel
from nestify.recipe import Recipe
from nestify.schedules.channels import channel_counts, importance_orders
from nestify.schedules.skip import masked_names
from nestify.schedules.weights import select_entry_levels, takes_n_of_m
from nestify.structure import Structure


def nest(network: nn.Module, spec: ModelSpec, recipe: Recipe, channels: ChannelMap | None) -> NestedModel:
    """Make a nested model whose weights are yet to be chosen; see `choose_weights`.

    Args:
        network: taken over. With `channels`, its channels are put in the order of their importance, which
            changes no logit.
        channels: its coupled channels where the schedule is `channel`; None where it is `weight`.

    Raises:
        RecipeError: if `schedule.skip` names nothing, or everything, or two levels have the same channels.
        UnsupportedModelError: if a narrower level cannot be made of the network.
    """
    names = [level.name for level in recipe.levels]
    if channels is None:
        masked = masked_names(spec, recipe.schedule.skip)
        return NestedModel(network, spec, names, masked=masked, bn=recipe.train.bn)
    counts = channel_counts(channels.groups, recipe.levels, recipe.schedule.divisor)
    _check_distinct(spec, recipe, channels, counts)
    permute_channels(network, channels, importance_orders(channels.groups, state_tensors(network)))
    structure = Structure(channels, tuple(counts))
    return NestedModel(network, spec, names, masked=(), bn=recipe.train.bn, structure=structure)


def _check_distinct(
    spec: ModelSpec, recipe: Recipe, channels: ChannelMap, counts: Sequence[tuple[int, ...]]
) -> None:
    """Refuse levels that would be one and the same network."""
    if not channels.groups:
        because = f", because of {', '.join(sorted(channels.unknown))}" if channels.unknown else ""
        raise UnsupportedModelError(
            f"{spec.architecture} has no channels that can be left out{because}; --schedule weight works for "
            "every model"
        )
    for k, (lower, higher) in enumerate(pairwise(counts), start=1):
        if lower == higher:
            raise RecipeError(
                f"level[{k}].width = {recipe.levels[k - 1].width:g} gives {spec.architecture} the "
                f"same channels as level[{k + 1}]; choose widths further apart, or a schedule.divisor below "
                f"{recipe.schedule.divisor}"
            )


def choose_weights(nested: NestedModel, recipe: Recipe) -> None:
    """Choose the weights of every level at its target, at once; nothing where the schedule masks none."""
    weights = {name: nested.shared_tensor(name) for name in nested.entry}
    if weights:
        nested.set_entry_levels(select_entry_levels(weights, recipe.levels, recipe.schedule.score))


def dense_layers(nested: NestedModel, levels: Sequence[Level]) -> list[str]:
    """Maskable weights that an N:M pattern cannot take, so that they stay whole."""
    m = next((level.pattern.m for level in levels if level.pattern.kind == "n:m"), 0)
    return [n for n, e in nested.entry.items() if m and not takes_n_of_m(tuple(e.shape), m)]
