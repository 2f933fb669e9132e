"""Choosing the weights of higher levels around frozen lower ones, whose entry levels stay as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nestify.model.entry_levels import EntryLevels
from nestify.recipe.level_options import Score
from nestify.recipe.levels import Level
from nestify.schedule.weights import Weights, select_entry_levels


@torch.no_grad()
def select_around_frozen(
    weights: Weights,
    levels: Sequence[Level],
    score: Score,
    available: Weights,
    entry: Mapping[str, Tensor],
    frozen: int,
    macs: Mapping[str, int] | None = None,
) -> EntryLevels:
    """Choose the entry levels of the weights that the frozen levels do not use.

    Args:
        weights: name -> maskable weight, as for `select_entry_levels`.
        levels: all levels, core first, frozen ones included.
        score: how weights are ranked.
        available: name -> the lowest level that can use each weight, as for `select_entry_levels`.
        entry: name -> the current entry levels, uint8 in the weight's shape.
        frozen: number of frozen levels; weights that enter at these levels keep their entry levels.
        macs: name -> dense multiply-accumulates per image, as for `select_entry_levels`.

    Returns:
        Entry levels at which every level above the frozen ones has its sparsity.
    """
    held = {name: entry[name] <= frozen for name in weights}
    if any(level.pattern.kind == "n:m" and level.sparsity > 0 for level in levels):
        # A group ranks its weights by magnitude: those of frozen levels come first, the core's at the top.
        ranked = {
            name: torch.where(
                held[name], (1 + weight.abs().max()) * (frozen + 2 - entry[name].to(weight.dtype)), weight
            )
            for name, weight in weights.items()
        }
        chosen = select_entry_levels(ranked, levels, score, available, macs)
    else:
        # Frozen levels take all that they can use, which is what they have.
        reserved = {
            name: torch.where(held[name], entry[name], available[name].clamp(min=frozen + 1))
            for name in weights
        }
        complete = [replace(level, sparsity=0.0) for level in levels[:frozen]]
        chosen = select_entry_levels(weights, [*complete, *levels[frozen:]], score, reserved, macs)
    return EntryLevels(
        len(levels),
        {name: torch.where(held[name], entry[name], chosen[name].clamp(min=frozen + 1)) for name in weights},
    )
