"""Narrower levels of a nested network: how many channels of each group a level has, and what follows."""

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from nestify.channels.axes import Axes, sliced
from nestify.channels.channel_map import ChannelMap
from nestify.nested_file.axes import box_levels

AxisLevels = Mapping[str, Mapping[int, Tensor]]
"""By tensor and dimension: uint8 (extent,), the lowest level that has each index."""


@dataclass(frozen=True)
class Structure:
    """Channels of every level. A level has the first units of each group, so levels nest.

    Attributes:
        channels: the coupled channels of the full network, its units in order of importance.
        counts: per level, core first, and per group: how many units the level has.

    Raises:
        ValueError: on construction, if a level has no unit of a group, fewer than the one below, or more
            than there are.
    """

    channels: ChannelMap
    counts: tuple[tuple[int, ...], ...]
    _axes: list[Axes] = field(init=False, repr=False, compare=False)
    _skeletons: dict[tuple[int, bool, torch.device], fx.GraphModule] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        below = tuple(1 for _ in self._units)
        for counts in (*self.counts, self._units):
            if len(counts) != len(below) or any(a > b for a, b in zip(below, counts, strict=True)):
                raise ValueError("the channels of the levels do not nest")
            below = counts
        axes = [self.channels.axes([np.arange(count) for count in counts]) for counts in self.counts]
        object.__setattr__(self, "_axes", axes)

    def __deepcopy__(self, memo: object) -> "Structure":
        return self  # what it holds never changes

    @property
    def _units(self) -> tuple[int, ...]:
        return tuple(group.units for group in self.channels.groups)

    def is_whole(self, level: int) -> bool:
        """Whether a level has all channels."""
        return self.counts[level - 1] == self._units

    def axes(self, level: int) -> Axes:
        """Kept indices of every tensor that a level has in part."""
        return self._axes[level - 1]

    def cut(self, level: int, name: str, tensor: Tensor) -> Tensor:
        """A level's part of a tensor of the full network; differentiable."""
        return sliced(tensor, self.axes(level).get(name, {}))

    def skeleton(self, level: int, *, training: bool, device: torch.device) -> fx.GraphModule:
        """A level's network, to be called with the level's tensors (`torch.func.functional_call`)."""
        key = (level, training, device)
        if key not in self._skeletons:
            self._skeletons[key] = self.channels.skeleton(self.axes(level), training=training, device=device)
        return self._skeletons[key]

    def network(self, level: int, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
        """A level's network with tensors of its own, in evaluation mode, where the tensors are.

        Args:
            tensors: the level's, by state-dict name; others besides are left out.
        """
        device = next(iter(tensors.values())).device
        network = deepcopy(self.skeleton(level, training=False, device=device))
        own = {name: tensors[name].detach().clone() for name in network.state_dict()}
        network.load_state_dict(own, assign=True)
        return network.eval()

    def entry_levels(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The lowest level that has each element of these tensors, uint8, as far as levels differ in them."""
        return {
            name: torch.from_numpy(
                box_levels(tuple(tensors[name].shape), {dim: along.numpy() for dim, along in axes.items()})
            )
            for name, axes in self.axis_levels(tensors).items()
        }

    def axis_levels(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """The lowest level that has each index of these tensors of the full network.

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
        return found


def structure_of(
    channels: ChannelMap, levels: AxisLevels, names: Collection[str], n_levels: int
) -> Structure:
    """The structure that a file describes by its tensors' axes.

    Args:
        levels: the lowest level that has each index, as far as levels differ.
        names: of all tensors that have axes where levels differ in them.

    Raises:
        UnsupportedModelError: if the axes of a level make no network.
        ValueError: if a level has others than the first units of a group.
    """
    counts = []
    for level in range(1, n_levels + 1):
        axes = {
            name: {dim: np.flatnonzero(along.numpy() <= level) for dim, along in dims.items()}
            for name, dims in levels.items()
        }
        units = channels.kept_units(axes, names)
        if any(not np.array_equal(kept, np.arange(len(kept))) for kept in units):
            raise ValueError(f"level {level} has others than the first channels")
        counts.append(tuple(map(len, units)))
    return Structure(channels, tuple(counts))
