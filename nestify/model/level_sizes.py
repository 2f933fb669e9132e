"""Smaller levels of a nested network: which channels and blocks a level has, and what follows."""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, fx

from nestify.model.entry_levels import box_levels
from nestify.model.graph.axes import Axes, take_indices
from nestify.model.graph.block_map import BlockMap
from nestify.model.graph.channel_map import ChannelMap
from nestify.model.heads import set_classes

AxisLevels = Mapping[str, Mapping[int, Tensor]]
"""By tensor and dimension: uint8 (extent,), the lowest level that has each index."""


@dataclass(frozen=True)
class LevelSizes:
    """Channels and blocks of every level; levels nest in both.

    A level has the first units of each group of coupled channels, and all blocks but those that it skips.

    Attributes:
        channels: the coupled channels of the full network, its units in order of importance.
        layers: the blocks of the full network that can be skipped.
        counts: per level, core first, and per group: how many units the level has.
        skipped: per level, core first: names of the blocks that it skips.

    Raises:
        ValueError: on construction, if a level has no unit of a group, fewer than the one below, or more
            than there are, or skips a block that the one below has.
        UnsupportedModelError: if a block is not one of the network's.
    """

    channels: ChannelMap
    layers: BlockMap
    counts: tuple[tuple[int, ...], ...]
    skipped: tuple[frozenset[str], ...]
    _axes: list[Axes] = field(init=False, repr=False, compare=False)
    _missing: list[frozenset[str]] = field(init=False, repr=False, compare=False)
    _skeletons: dict[tuple[int, bool, torch.device], fx.GraphModule] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        below = tuple(1 for _ in self._units)
        for counts in (*self.counts, self._units):
            if len(counts) != len(below) or any(a > b for a, b in zip(below, counts, strict=True)):
                raise ValueError("the channels of the levels do not nest")
            below = counts
        if any(not lower >= higher for lower, higher in pairwise(self.skipped)):
            raise ValueError("the blocks of the levels do not nest")
        axes = [self.channels.axes([np.arange(count) for count in counts]) for counts in self.counts]
        object.__setattr__(self, "_axes", axes)
        missing = [self.layers.unused_names(skipped) for skipped in self.skipped]
        object.__setattr__(self, "_missing", missing)

    def __deepcopy__(self, memo: object) -> "LevelSizes":
        return self  # what it holds never changes

    @property
    def _units(self) -> tuple[int, ...]:
        return tuple(group.units for group in self.channels.groups)

    def is_whole(self, level: int) -> bool:
        """Whether a level has all channels and all blocks."""
        return self.counts[level - 1] == self._units and not self.skipped[level - 1]

    def axes(self, level: int) -> Axes:
        """Kept indices of every tensor that a level has in part."""
        return self._axes[level - 1]

    def has(self, level: int, name: str) -> bool:
        """Whether a level has a tensor: not one that only blocks read that it skips."""
        return name not in self._missing[level - 1]

    def names(self, level: int) -> tuple[str, ...]:
        """State-dict names of the tensors that a level computes with."""
        return tuple(name for name in self.channels.names if self.has(level, name))

    def skipped_in_order(self) -> list[list[str]]:
        """Names of the blocks that each level skips, in order of execution."""
        names = [block.name for block in self.layers.blocks]
        return [[name for name in names if name in skipped] for skipped in self.skipped]

    def cut(self, level: int, name: str, tensor: Tensor) -> Tensor:
        """A level's part of a tensor of the full network; differentiable."""
        return take_indices(tensor, self.axes(level).get(name, {}))

    def skeleton(self, level: int, *, training: bool, device: torch.device) -> fx.GraphModule:
        """A level's network, to be called with the level's tensors (`torch.func.functional_call`)."""
        key = (level, training, device)
        if key not in self._skeletons:
            self._skeletons[key] = self.channels.skeleton(
                self.axes(level),
                replacements=self.layers.replacements(self.skipped[level - 1]),
                training=training,
                device=device,
            )
        return self._skeletons[key]

    def network(self, level: int, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
        """A level's network with tensors of its own, in evaluation mode, where the tensors are.

        Args:
            tensors: the level's, by state-dict name; others besides are left out.
        """
        device = next(iter(tensors.values())).device
        network = deepcopy(self.skeleton(level, training=False, device=device))
        own = {name: tensors[name].detach().clone() for name in network.state_dict()}
        for name, tensor in network.state_dict().items():
            if tensor.shape != own[name].shape:  # a classifier of other classes
                set_classes(network, [name], len(own[name]))
        network.load_state_dict(own, assign=True)
        return network.eval()

    def entry_levels(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The lowest level that has each element of these tensors, uint8, as far as levels differ in them."""
        axes = self.axis_levels(tensors)
        found = {
            name: torch.from_numpy(
                box_levels(tuple(tensors[name].shape), {dim: along.numpy() for dim, along in dims.items()})
            )
            for name, dims in axes.items()
        }
        for level in range(len(self.skipped), 0, -1):
            for name in self._missing[level - 1] & tensors.keys():
                tensor = tensors[name]
                if tensor.is_floating_point() and tensor.ndim:
                    entry = found.setdefault(name, torch.ones(tensor.shape, dtype=torch.uint8))
                    entry.clamp_(min=level + 1)
        return found

    def axis_levels(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """The lowest level that has each index of these tensors of the full network, where that is not 1.

        Tensors that are not of floating point are left out: a file holds them whole.
        """
        shapes = {name: tensor.shape for name, tensor in tensors.items() if tensor.is_floating_point()}
        found: dict[str, dict[int, Tensor]] = {}
        n = len(self.counts)
        for level in range(n, 0, -1):
            for name, kept in self.axes(level).items():
                for dim, indices in kept.items() if name in shapes else ():
                    above = n if self.is_whole(n) else n + 1
                    levels = found.setdefault(name, {}).setdefault(
                        dim, torch.full((shapes[name][dim],), above, dtype=torch.uint8)
                    )
                    levels[torch.tensor(indices)] = level
        parts = {
            name: {dim: levels for dim, levels in dims.items() if bool((levels > 1).any())}
            for name, dims in found.items()
        }
        return {name: dims for name, dims in parts.items() if dims}


def level_sizes_of(
    channels: ChannelMap,
    layers: BlockMap,
    levels: AxisLevels,
    names: Collection[str],
    skipped: Sequence[Collection[str]],
) -> LevelSizes:
    """The structure that a file describes by its tensors' axes and its levels' skipped blocks.

    Args:
        levels: the lowest level that has each index, as far as levels differ.
        names: of all tensors that have axes where levels differ in them.
        skipped: per level, core first, names of blocks.

    Raises:
        UnsupportedModelError: if the axes of a level make no network, or a block is not one of the network's.
        ValueError: if a level has others than the first units of a group.
    """
    counts = []
    for level in range(1, len(skipped) + 1):
        axes = {
            name: {dim: np.flatnonzero(along.numpy() <= level) for dim, along in dims.items()}
            for name, dims in levels.items()
        }
        units = channels.kept_units(axes, names)
        if any(not np.array_equal(kept, np.arange(len(kept))) for kept in units):
            raise ValueError(f"level {level} has others than the first channels")
        counts.append(tuple(map(len, units)))
    return LevelSizes(channels, layers, tuple(counts), tuple(map(frozenset, skipped)))
