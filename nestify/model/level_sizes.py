"""Smaller levels of a nested network: which channels, blocks and tensors each level has."""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, fx

from nestify.errors import RecipeError
from nestify.model.entry_levels import box_levels
from nestify.model.graph.axes import Axes, Indices, take_indices
from nestify.model.graph.block_map import BlockMap
from nestify.model.graph.channel_map import ChannelMap
from nestify.model.heads import set_classes

AxisLevels = Mapping[str, Mapping[int, Tensor]]
"""Tensor name -> dimension -> uint8 (extent,), the lowest level that has each index."""


@dataclass(frozen=True)
class LevelSizes:
    """The channels and blocks of every level; the levels nest in both.

    A level has the first units of each group of coupled channels, and all blocks except those it skips.

    Attributes:
        channels: the coupled channels of the full network, the units of each group in order of importance.
        layers: the blocks of the full network that can be skipped.
        counts: per level, core first, the number of units of each group.
        skipped: per level, core first, the names of the blocks that the level skips.

    Raises:
        ValueError: on construction, if a level has no unit of a group, fewer than the level below or more
            than the group has, or if it skips a block that the level below has.
        UnsupportedModelError: on construction, if the network has no block of a skipped name.
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

    _copies: dict[tuple[int, torch.device], Tensor] = field(
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
        return self  # immutable, apart from its cache of skeletons

    def __reduce__(self) -> NoReturn:
        raise RecipeError(
            "a nested model with narrower or shallower levels cannot be pickled, because it holds traces of "
            "torch; store its state_dict(), or a nested file (save), which nestify.load reads"
        )

    @property
    def _units(self) -> tuple[int, ...]:
        return tuple(group.units for group in self.channels.groups)

    def is_full(self, level: int) -> bool:
        """Whether a level has all channels and all blocks."""
        return self.counts[level - 1] == self._units and not self.skipped[level - 1]

    def axes(self, level: int) -> Axes:
        """Return the indices that a level keeps of every tensor that it does not have in full."""
        return self._axes[level - 1]

    def has_tensor(self, level: int, name: str) -> bool:
        """Whether a level has a tensor; it lacks those that are read only by blocks that it skips."""
        return name not in self._missing[level - 1]

    def names(self, level: int) -> tuple[str, ...]:
        """Return the state-dict names of the tensors that a level computes with."""
        return tuple(name for name in self.channels.names if self.has_tensor(level, name))

    def skipped_in_order(self) -> list[list[str]]:
        """Return the names of the blocks that each level skips, core first, in order of execution."""
        names = [block.name for block in self.layers.blocks]
        return [[name for name in names if name in skipped] for skipped in self.skipped]

    def cut(self, level: int, name: str, tensor: Tensor) -> Tensor:
        """Cut a level's part out of a tensor of the full network; differentiable."""
        return take_indices(tensor, self.axes(level).get(name, {}), self._indices_on)

    def _indices_on(self, kept: Indices, device: torch.device) -> Tensor:
        """Return the indices of a level's axes on a device, copied once; the axes never change."""
        key = (id(kept), device)
        if key not in self._copies:
            self._copies[key] = torch.as_tensor(kept, device=device)
        return self._copies[key]

    def skeleton(self, level: int, *, training: bool, device: torch.device) -> fx.GraphModule:
        """Return a level's network without weights, for `torch.func.functional_call` with its tensors."""
        key = (level, training, device)
        if key not in self._skeletons:
            self._skeletons[key] = self.channels.skeleton(
                self.axes(level),
                replacements=self.layers.replacements(self.skipped[level - 1]),
                training=training,
                device=device,
            )
        return self._skeletons[key]

    def make_network(self, level: int, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
        """Make a level's network with its own copies of the tensors, in eval mode, on their device.

        Args:
            level: 1-based.
            tensors: state-dict name -> tensor of the level; names that the level does not use are ignored.
        """
        device = next(iter(tensors.values())).device
        network = deepcopy(self.skeleton(level, training=False, device=device))
        own = {name: tensors[name].detach().clone() for name in network.state_dict()}
        for name, tensor in network.state_dict().items():
            if tensor.shape != own[name].shape:  # a classifier for another number of classes
                set_classes(network, [name], len(own[name]))
        network.load_state_dict(own, assign=True)
        return network.eval()

    def entry_levels(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the lowest level that has each element of the given tensors.

        Args:
            tensors: state-dict name -> tensor of the full network.

        Returns:
            Name -> uint8 in the tensor's shape, for the tensors in which levels differ.
        """
        axes = self.axis_levels(tensors)
        found = {
            name: torch.from_numpy(
                box_levels(tuple(tensors[name].shape), {dim: entry.numpy() for dim, entry in dims.items()})
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
        """Return the lowest level that has each index of the given tensors.

        Tensors that are not floating point are left out: a file stores them in full.

        Args:
            tensors: state-dict name -> tensor of the full network.

        Returns:
            Name -> dimension -> uint8 (extent,), for the dimensions of which level 1 lacks an index.
        """
        shapes = {name: tensor.shape for name, tensor in tensors.items() if tensor.is_floating_point()}
        found: dict[str, dict[int, Tensor]] = {}
        n = len(self.counts)
        for level in range(n, 0, -1):
            for name, kept in self.axes(level).items():
                for dim, indices in kept.items() if name in shapes else ():
                    above = n if self.is_full(n) else n + 1
                    levels = found.setdefault(name, {}).setdefault(
                        dim, torch.full((shapes[name][dim],), above, dtype=torch.uint8)
                    )
                    levels[torch.tensor(indices)] = level
        parts = {
            name: {dim: levels for dim, levels in dims.items() if bool((levels > 1).any())}
            for name, dims in found.items()
        }
        return {name: dims for name, dims in parts.items() if dims}


def derive_level_sizes(
    channels: ChannelMap,
    layers: BlockMap,
    levels: AxisLevels,
    names: Collection[str],
    skipped: Sequence[Collection[str]],
) -> LevelSizes:
    """Derive the sizes of all levels from the axes and the skipped blocks that a file stores.

    Args:
        channels: the coupled channels of the full network.
        layers: the blocks of the full network that can be skipped.
        levels: the lowest level that has each index, for the dimensions in which levels differ.
        names: names of the tensors for which `levels` is complete: any dimension that it does not list is
            the same at all levels.
        skipped: per level, core first, the names of the blocks that it skips.

    Raises:
        UnsupportedModelError: if the axes of a level do not fit the network, or the network has no block
            of a skipped name.
        ValueError: if the units that a level has of a group are not the first ones.
    """
    counts = []
    for level in range(1, len(skipped) + 1):
        axes = {
            name: {dim: np.flatnonzero(entry.numpy() <= level) for dim, entry in dims.items()}
            for name, dims in levels.items()
        }
        units = channels.kept_units(axes, names)
        if any(not np.array_equal(kept, np.arange(len(kept))) for kept in units):
            raise ValueError(f"the channels of level {level} are not the first channels of their groups")
        counts.append(tuple(map(len, units)))
    return LevelSizes(channels, layers, tuple(counts), tuple(map(frozenset, skipped)))
