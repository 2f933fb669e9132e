"""The groups of coupled channels of a model, and its networks with fewer channels."""

import json
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from nestify.errors import UnsupportedModelError
from nestify.model.graph.analysis import Analysis, analyse
from nestify.model.graph.axes import Axes, Indices, choose, take_indices
from nestify.model.graph.groups import Group, find_groups, frozen_dimensions
from nestify.model.graph.skipping import prune_graph
from nestify.model.graph.subnetwork import build_network
from nestify.model.graph.trace import Traced, trace
from nestify.model.spec import ModelSpec, state_tensors


def map_channels(
    model: nn.Module, input_size: tuple[int, int, int], *, keep_outputs: bool = True
) -> "ChannelMap":
    """Find the channels of a model that must be kept or dropped together.

    The model stays as it is. The groups do not depend on its weights, so a model on the meta device has the
    same groups, except that channels combined with a constant are frozen if the constant has no values.

    Args:
        model: a model that returns one tensor, or a timm model that returns a list of feature maps.
        input_size: (channels, height, width) of the images, in pixels.
        keep_outputs: whether the channels of the model's outputs are kept in full, as a classifier's must be.

    Raises:
        UnsupportedModelError: if torch cannot trace the model, or the analysis does not support an operation.
    """
    return ChannelMap(analyse(trace(model, input_size), keep_outputs))


REMEMBERED = 4
"""Number of architectures whose channels `map_built_channels` remembers."""

_remembered: OrderedDict[Hashable, "ChannelMap"] = OrderedDict()


def map_built_channels(network: nn.Module, spec: ModelSpec, *, keep_outputs: bool = True) -> "ChannelMap":
    """Find the channels of a network that was built from its description, and has not been changed since.

    As `map_channels`, but the channels of the last architectures are remembered, because tracing takes
    seconds and all levels of a file need the same channels.

    Args:
        network: the network, with any weights.
        spec: its description.
        keep_outputs: whether the channels of the model's outputs are kept in full.

    Raises:
        UnsupportedModelError: as `map_channels` does.
    """
    tensors = tuple(
        (name, tuple(tensor.shape), tensor.dtype, tensor.device)
        for name, tensor in chain(network.named_parameters(), network.named_buffers())
    )
    kwargs = json.dumps(spec.kwargs, sort_keys=True, default=repr)
    key = (type(network), spec.architecture, kwargs, spec.input_size, keep_outputs, tensors)
    found = _remembered.pop(key, None)
    if found is None:
        found = map_channels(network, spec.input_size, keep_outputs=keep_outputs)
    _remembered[key] = found
    while len(_remembered) > REMEMBERED:
        _remembered.popitem(last=False)
    return found


class ChannelMap:
    """The groups of coupled channels of one model, and its networks with fewer channels. Immutable.

    Holds no tensor of the model's state dict.

    Attributes:
        traced: the model's graph.
        groups: the groups in the order of the graph.
        unknown: names of the operators without a rule, whose tensors are kept in full.
        frozen: maps each (tensor, dimension) with indices that are in no group to the reason.
        names: state-dict names of the parameters and buffers that the logits depend on in evaluation mode;
            a tied tensor has its first name.
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
        """Return the kept indices of every tensor when each group keeps some of its units.

        Args:
            kept: per group, the (kept,) units; None keeps all of them.

        Returns:
            The kept indices of every dimension that has channels of a group, even if all are kept, for the
            tensors in `names` and the graph's constants.
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
        """Return the (kept,) units of each group, ascending: the inverse of `axes`.

        Args:
            axes: kept indices, which may come from an untrusted file.
            among: tensors for which `axes` is complete: a dimension that it omits is kept in full. None means
                `names`. Any other tensor may be absent, but must be consistent if it is present.

        Raises:
            UnsupportedModelError: if the axes name a tensor or dimension without channels, keep no unit of a
                group, or keep a channel in one tensor and drop it in another.
        """
        complete = frozenset(self.names if among is None else among)
        units = tuple(self._kept_units(group, axes, complete) for group in self.groups)
        derived = self.axes(units)
        for name in dict.fromkeys((*(name for name in self._shapes if name in complete), *axes)):
            for dim in sorted({*axes.get(name, {}), *derived.get(name, {})}):
                given, expected = axes.get(name, {}).get(dim), derived.get(name, {}).get(dim)
                if not self._is_consistent(name, dim, given, expected):
                    raise UnsupportedModelError(
                        f"the kept indices of {name!r}, dimension {dim}, contradict those of the channels "
                        "that it is coupled with; use a file that was made for this model"
                    )
        return units

    def skeleton(
        self,
        axes: Axes,
        *,
        training: bool,
        device: torch.device,
        replacements: Mapping[str, str] = MappingProxyType({}),
    ) -> fx.GraphModule:
        """Return the network of a level, without weights.

        Its parameters and persistent buffers are on the meta device, under the state-dict names of the full
        model, with the shapes of the level: `torch.func.functional_call(skeleton, tensors, (images,))`
        supplies them for one call, `skeleton.load_state_dict(tensors, assign=True)` permanently. Constants
        and non-persistent buffers have their values.

        Args:
            axes: kept indices in the form that `axes` returns, which may come from an untrusted file.
                Constants and tensors that the level does not read may be omitted.
            training: True makes batch norm use the statistics of the batch, and update in place the running
                statistics that it is given; dropout drops. All other operators work as in evaluation: no
                stochastic depth, no dropout inside fused attention.
            device: device of the tensors that will be supplied.
            replacements: name of a node of the graph -> name of an earlier one, of the same shape and type,
                that is read in its place. Operators and tensors that are then unused are left out.

        Raises:
            UnsupportedModelError: if the axes contradict each other (see `kept_units`), the network does not
                run with the shapes that follow from them, or an operator writes in place into a replaced node
                or a replacement.
        """
        pruned_graph = prune_graph(self.traced.graph, replacements)
        read = {name for node, name in self.traced.names.items() if node in pruned_graph.needed}
        units = self.kept_units(axes, [name for name in self.names if name in read or name in axes])
        complete = self.axes(units)
        constants = {
            name: take_indices(t, complete.get(name, {})) for name, t in self.traced.constants.items()
        }
        choice = choose(self._found, self._roots, units)
        return build_network(choice, pruned_graph, constants, training=training, device=device)

    def _kept_units(self, group: Group, axes: Axes, complete: frozenset[str]) -> Indices:
        """Return the units that are kept in the group's first tensor for which `axes` is complete."""
        member = next((member for member in group.members if member.name in complete), None)
        given = None if member is None else axes.get(member.name, {}).get(member.dim)
        if member is None or given is None:
            return np.arange(group.units)
        units = np.flatnonzero(np.isin(member.indices, given).all(axis=1))
        if not len(units):
            raise UnsupportedModelError(
                f"the kept indices of {member.name!r}, dimension {member.dim}, contain no complete unit of "
                "channels, of which a level keeps at least one; use a file that was made for this model"
            )
        return units

    def _is_consistent(self, name: str, dim: int, given: Indices | None, expected: Indices | None) -> bool:
        """Whether two lists of kept indices of a tensor's dimension are the same; None means all of them."""
        if name not in self._shapes or not 0 <= dim < len(self._shapes[name]):
            return False
        every = np.arange(self._shapes[name][dim])
        return np.array_equal(every if given is None else given, every if expected is None else expected)


@torch.no_grad()
def permute_channels(model: nn.Module, channel_map: "ChannelMap", orders: Sequence[Indices]) -> None:
    """Permute the units of every group, in place.

    Tensors that do not affect the logits in evaluation mode stay as they are.

    Args:
        model: the model of `channel_map`, or a model of the same architecture.
        channel_map: the groups of its channels.
        orders: per group, a permutation of its units; unit `orders[g][u]` moves to position u.

    Raises:
        ValueError: if an order is not a permutation of the group's units.
    """
    moves: dict[tuple[str, int], Indices] = {}
    tensors = state_tensors(model)
    for number, (group, order) in enumerate(zip(channel_map.groups, orders, strict=True)):
        if not np.array_equal(np.sort(order), np.arange(group.units)):
            raise ValueError(f"orders[{number}] is not a permutation of {group.units} units")
        for member in group.members:
            if member.name in tensors:
                extent = tensors[member.name].shape[member.dim]
                move = moves.setdefault((member.name, member.dim), np.arange(extent))
                move[member.indices] = member.indices[order]
    for (name, dim), move in moves.items():
        tensor = tensors[name]
        tensor.copy_(tensor.index_select(dim, torch.as_tensor(move, device=tensor.device)))
    # Models such as LeViT cache values computed from their parameters in evaluation; train() clears them.
    was_training = model.training
    model.train().train(was_training)
