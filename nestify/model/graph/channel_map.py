"""What the channel schedule knows of a model: its groups of coupled channels, and its narrower networks."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from nestify.errors import UnsupportedModelError
from nestify.model.graph.analysis import Analysis, analyse
from nestify.model.graph.axes import Axes, Indices, choose, sliced
from nestify.model.graph.groups import Group, find_groups, frozen_dimensions
from nestify.model.graph.skipping import remains_of
from nestify.model.graph.subnetwork import narrow
from nestify.model.graph.trace import Traced, trace
from nestify.model.spec import state_tensors


def find_channels(model: nn.Module, input_size: tuple[int, int, int]) -> "ChannelMap":
    """Find the channels of a model that must be kept or dropped together.

    The model stays as it is. Its weights do not count, so that one without any (on the meta device) has the
    same groups, but for channels that meet a constant: without its values they are frozen.

    Args:
        model: its logits are one tensor.
        input_size: (channels, height, width) of the images, in pixels.

    Raises:
        UnsupportedModelError: if torch cannot trace the model, or it does what the analysis cannot follow.
    """
    return ChannelMap(analyse(trace(model, input_size)))


class ChannelMap:
    """Groups of coupled channels of one model, and its networks of fewer channels. Does not change.

    Holds no tensor of the model's state dict.

    Attributes:
        traced: the model's graph.
        groups: in the order of the graph.
        unknown: operators without a rule, whose tensors stay whole.
        frozen: why a (tensor, dimension) is, in whole or in part, in no group.
        names: of the parameters and buffers of the model's state dict that its logits depend on in
            evaluation mode; tied ones by the first.
    """

    traced: Traced
    groups: tuple[Group, ...]
    unknown: frozenset[str]
    frozen: Mapping[tuple[str, int], str]
    names: tuple[str, ...]

    def __init__(self, found: Analysis) -> None:
        groups = find_groups(found)
        self._found = found
        self.traced = found.traced
        self._roots = tuple(roots for _, roots in groups)
        self._shapes = {name: found.labels[node].shape for node, name in found.traced.names.items()}
        self.groups = tuple(group for group, _ in groups)
        self.unknown = frozenset(found.unknown)
        self.frozen = MappingProxyType(frozen_dimensions(found, self._roots))
        self.names = tuple(name for name in self._shapes if name not in found.traced.constants)

    def __copy__(self) -> "ChannelMap":
        return self

    def __deepcopy__(self, memo: Any) -> "ChannelMap":
        return self

    def axes(self, kept: Sequence[Indices | None]) -> Axes:
        """Which indices of every tensor stay where these units of each group do.

        Args:
            kept: per group (kept,) units; None keeps all of them.

        Returns:
            for every dimension that has channels of a group, whole or not, of the tensors in `names` and of
            the graph's constants.
        """
        dropped: dict[tuple[str, int], list[Indices]] = defaultdict(list)
        for group, units in zip(self.groups, kept, strict=True):
            every = np.arange(group.units)
            gone = every[:0] if units is None else np.setdiff1d(every, units)
            for member in group.members:
                dropped[member.name, member.dim].append(member.indices[gone].ravel())
        axes: dict[str, dict[int, Indices]] = defaultdict(dict)
        for (name, dim), indices in dropped.items():
            every = np.arange(self._shapes[name][dim])
            axes[name][dim] = np.setdiff1d(every, np.concatenate(indices))
        return dict(axes)

    def kept_units(self, axes: Axes, among: Collection[str] | None = None) -> tuple[Indices, ...]:
        """The inverse of `axes`: per group the (kept,) units that stay, ascending.

        Args:
            axes: may come from an untrusted file.
            among: tensors that `axes` speaks of, so that a dimension that it leaves out is whole; those of
                `names` by default. Of others it may say what follows, or nothing.

        Raises:
            UnsupportedModelError: if the axes name what has no channels, keep none of a group's units, or
                keep a channel in one tensor and drop it in another.
        """
        told = frozenset(self.names if among is None else among)
        units = tuple(self._units(group, axes, told) for group in self.groups)
        derived = self.axes(units)
        for name in dict.fromkeys((*(name for name in self._shapes if name in told), *axes)):
            for dim in sorted({*axes.get(name, {}), *derived.get(name, {})}):
                given, expected = axes.get(name, {}).get(dim), derived.get(name, {}).get(dim)
                if not self._agree(name, dim, given, expected):
                    raise UnsupportedModelError(
                        f"the kept indices of {name!r}, dimension {dim}, are not those of the channels that "
                        "it is coupled with, so they make no network; use a file that was made for this model"
                    )
        return units

    def skeleton(
        self,
        axes: Axes,
        *,
        training: bool,
        device: torch.device,
        substitutes: Mapping[str, str] = MappingProxyType({}),
    ) -> fx.GraphModule:
        """The network of a level, without values.

        Its parameters and persistent buffers are on the meta device, under the state-dict names of the full
        model, with the shapes of the level: `torch.func.functional_call(skeleton, tensors, (images,))`
        supplies them, `skeleton.load_state_dict(tensors, assign=True)` fills them for good. Constants and
        non-persistent buffers have their values.

        Args:
            axes: as `axes` gives them; may come from an untrusted file. Constants may be left out, and so
                may tensors that the level does not read.
            training: batch norm uses the statistics of the batch, and updates the running ones that it is
                given, in place; dropout drops. All other operators work as in evaluation: no stochastic
                depth, no dropout inside fused attention.
            device: of the tensors that will be supplied.
            substitutes: name of a node of the graph -> name of an earlier one, of the same shape and type,
                that stands for it. What nothing reads then is left out, its tensors as well.

        Raises:
            UnsupportedModelError: if the axes contradict each other (see `kept_units`), the network does not
                compute with the shapes that follow from them, or an operator writes in place into what is
                replaced or stands in.
        """
        remains = remains_of(self.traced.graph, substitutes)
        read = {name for node, name in self.traced.names.items() if node in remains.needed}
        units = self.kept_units(axes, [name for name in self.names if name in read or name in axes])
        whole = self.axes(units)
        constants = {name: sliced(t, whole.get(name, {})) for name, t in self.traced.constants.items()}
        choice = choose(self._found, self._roots, units)
        return narrow(choice, remains, constants, training=training, device=device)

    def narrowed(self, kept: Sequence[Indices | None]) -> fx.GraphModule:
        """The network that keeps these units of each group, for evaluation on the CPU; see `skeleton`."""
        return self.skeleton(self.axes(kept), training=False, device=torch.device("cpu"))

    def _units(self, group: Group, axes: Axes, told: frozenset[str]) -> Indices:
        """Units whose channels the first tensor keeps that the axes speak of."""
        member = next((member for member in group.members if member.name in told), None)
        given = None if member is None else axes.get(member.name, {}).get(member.dim)
        if member is None or given is None:
            return np.arange(group.units)
        units = np.flatnonzero(np.isin(member.indices, given).all(axis=1))
        if not len(units):
            raise UnsupportedModelError(
                f"the kept indices of {member.name!r}, dimension {member.dim}, hold no whole channel; "
                "a level keeps one or more of every group"
            )
        return units

    def _agree(self, name: str, dim: int, given: Indices | None, expected: Indices | None) -> bool:
        """Whether two lists of kept indices are the same; None stands for all of them."""
        if name not in self._shapes or not 0 <= dim < len(self._shapes[name]):
            return False
        every = np.arange(self._shapes[name][dim])
        return np.array_equal(every if given is None else given, every if expected is None else expected)


@torch.no_grad()
def permute_channels(model: nn.Module, channel_map: "ChannelMap", orders: Sequence[Indices]) -> None:
    """Permute the units of every group, in place.

    Tensors that the logits of evaluation mode do not depend on stay as they are.

    Args:
        model: the one that `channel_map` was found in, or another one of the same architecture.
        orders: per group a permutation of its units; unit `orders[g][u]` moves to place u.

    Raises:
        ValueError: if one is no permutation of the group's units.
    """
    moves: dict[tuple[str, int], Indices] = {}
    tensors = state_tensors(model)
    for number, (group, order) in enumerate(zip(channel_map.groups, orders, strict=True)):
        if not np.array_equal(np.sort(order), np.arange(group.units)):
            raise ValueError(f"orders[{number}] is no permutation of {group.units} units")
        for member in group.members:
            if member.name in tensors:
                extent = tensors[member.name].shape[member.dim]
                move = moves.setdefault((member.name, member.dim), np.arange(extent))
                move[member.indices] = member.indices[order]
    for (name, dim), move in moves.items():
        tensor = tensors[name]
        tensor.copy_(tensor.index_select(dim, torch.as_tensor(move, device=tensor.device)))
    # LeViT and its kin keep what they computed of their parameters in evaluation until they train again.
    was_training = model.training
    model.train().train(was_training)
