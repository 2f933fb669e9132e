"""Groups of coupled channels: the indices of each tensor that belong to one unit."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nestify.model.graph.analysis import Analysis, all_labels, output_labels
from nestify.model.graph.labels import ChannelLabels
from nestify.model.graph.union_find import FROZEN, Nodes, UnionFind


def find_interchangeable_sets(found: Analysis) -> list[Nodes]:
    """Find the kinds of sets, where sets are of one kind if every tensor treats them alike.

    Returns:
        Per kind with more than one set, the (units,) roots of its sets, ascending; in the graph's order.
    """
    sets = found.coupling.sets
    kinds = np.zeros(len(sets), dtype=np.int64)  # the kind of each root
    for nodes, marks in _iter_marks(found):
        _split_kinds(kinds, sets.roots(nodes), marks)
    roots = np.unique(sets.roots(np.arange(len(sets))))
    roots = roots[roots != FROZEN]
    order = np.argsort(kinds[roots], kind="stable")
    starts = np.flatnonzero(np.diff(kinds[roots][order])) + 1
    parts = [part for part in np.split(roots[order], starts) if len(part) > 1]
    return sorted(parts, key=lambda part: int(part[0]))


def _iter_marks(found: Analysis) -> Iterator[tuple[Nodes, Nodes]]:
    """Yield each tensor's nodes in element order, with marks that distinguish the nodes of a set."""
    roles = _roles(found.coupling.sets)
    blocks = {id(block.nodes): block for labels in all_labels(found) for block in labels.blocks}
    for block in blocks.values():
        nodes = block.nodes.ravel()
        yield nodes, roles[nodes]
    for node, name in found.traced.names.items():
        if name in found.traced.constants:
            for block in found.labels[node].blocks:
                yield block.nodes, _value_ids(found.traced.constants[name], block.dims[0])


def _roles(sets: UnionFind) -> Nodes:
    """Number the nodes, equally if one `fresh` call made them as the n-th nodes of their sets.

    Returns:
        (nodes,)
    """
    roots, origins = sets.roots(np.arange(len(sets))), sets.origins
    order = np.lexsort((origins, roots))  # stable: ties are ordered by node
    begins = np.diff(roots[order], prepend=-1).astype(bool) | np.diff(origins[order], prepend=-1).astype(bool)
    places = np.arange(len(order))
    nth = places - np.maximum.accumulate(np.where(begins, places, 0))
    roles = np.empty_like(order)
    roles[order] = origins[order] * len(order) + nth
    return roles


def _value_ids(constant: Tensor, dim: int) -> Nodes:
    """Number the indices of a dimension, equally if the constant has equal values there.

    Returns:
        (extent,); all different for a constant on the meta device, whose values are unknown.
    """
    if constant.is_meta:
        return np.arange(constant.shape[dim])
    rows = constant.movedim(dim, 0).reshape(constant.shape[dim], -1).cpu()
    return np.asarray(torch.unique(rows, dim=0, return_inverse=True)[1].numpy(), dtype=np.int64)


def _split_kinds(kinds: Nodes, roots: Nodes, marks: Nodes) -> None:
    """Split a kind, in place, where one tensor treats its sets differently.

    Args:
        kinds: (nodes,) the kind of each root.
        roots: roots of the tensor's nodes, in element order.
        marks: mark of each node, in the same order.
    """
    order = np.argsort(roots, kind="stable")
    names, starts, counts = np.unique(roots[order], return_index=True, return_counts=True)
    for count in np.unique(counts[names != FROZEN]):
        chosen = (counts == count) & (names != FROZEN)
        rows = marks[order][starts[chosen][:, None] + np.arange(count)]
        marked = np.column_stack([kinds[names[chosen]], rows])
        new = np.unique(marked, axis=0, return_inverse=True)[1]
        kinds[names[chosen]] = kinds.max() + 1 + new.ravel()


@dataclass(frozen=True)
class Member:
    """The positions of a group's units in one tensor.

    Attributes:
        name: name of the tensor, as in `Traced.names`.
        dim: the dimension that holds the units.
        indices: (units, channels per unit); row u holds the indices of unit u, ascending.
    """

    name: str
    dim: int
    indices: NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Units of coupled channels: each is kept in all members or in none, and any number may be kept.

    Attributes:
        units: number of units, at least 2.
        members: every (tensor, dimension) that has channels of the units, in the order of the graph.
        mixed: names of operators (such as norms) that combine all channels, so that dropping one changes the
            results of the rest; empty if dropping is the same as zeroing.
        in_output: whether its units are channels of what the model returns, whose order must not change.
    """

    units: int
    members: tuple[Member, ...]
    mixed: tuple[str, ...]
    in_output: bool = False


@dataclass(frozen=True)
class _Dimension:
    """A dimension of a parameter, buffer or constant.

    Attributes:
        name: name of the tensor.
        dim: the dimension.
        nodes: (extent,) nodes along it.
    """

    name: str
    dim: int
    nodes: Nodes


def find_groups(found: Analysis) -> list[tuple[Group, Nodes]]:
    """Find the groups, each with the (units,) roots of its units, in the order of the graph."""
    parts = find_interchangeable_sets(found)
    group_of = np.full(len(found.coupling.sets), -1)
    for number, roots in enumerate(parts):
        group_of[roots] = number
    members: list[list[Member]] = [[] for _ in parts]
    for dimension in _dimensions(found):
        roots = found.coupling.sets.roots(dimension.nodes)
        for number in np.unique(group_of[roots]).tolist():
            if number >= 0:
                members[number].append(Member(dimension.name, dimension.dim, _rows(roots, parts[number])))
    mixed = _mixing_operators(found, group_of)
    returned = _returned_groups(found, group_of)
    return [
        (Group(len(roots), tuple(members[number]), tuple(sorted(mixed[number])), number in returned), roots)
        for number, roots in enumerate(parts)
        if members[number]
    ]


def frozen_dimensions(found: Analysis, groups: Iterable[Nodes]) -> dict[tuple[str, int], str]:
    """Find the dimensions with indices that are in no group: (name, dim) -> reason.

    Args:
        found: the analysis of the network.
        groups: per group, the roots of its units.
    """
    sets = found.coupling.sets
    in_group = np.zeros(len(sets), dtype=bool)
    for roots in groups:
        in_group[roots] = True
    reasons = {}
    for dimension in _dimensions(found):
        left_out = ~in_group[sets.roots(dimension.nodes)]
        if left_out.any():
            found_reasons = sets.reasons(dimension.nodes[left_out])
            reasons[dimension.name, dimension.dim] = "; ".join(found_reasons) or "no other channel is like it"
    return reasons


def _dimensions(found: Analysis) -> Iterator[_Dimension]:
    """Yield every dimension longer than 1 of the graph's placeholders, except the images."""
    for node, name in found.traced.names.items():
        labels: ChannelLabels = found.labels[node]
        for dim, extent in enumerate(labels.shape):
            if extent > 1:
                yield _Dimension(name, dim, labels.nodes_of(dim))


def _rows(nodes: Nodes, roots: Nodes) -> Nodes:
    """Return the positions of each root among a dimension's nodes: (units, count), ascending; read-only."""
    places = np.flatnonzero(np.isin(nodes, roots))
    rows = places[np.argsort(nodes[places], kind="stable")].reshape(len(roots), -1)
    rows.setflags(write=False)
    return rows


def _returned_groups(found: Analysis, group_of: Nodes) -> set[int]:
    """Return the numbers of the groups that the model's outputs have channels of."""
    blocks = [block for labels in output_labels(found) for block in labels.blocks]
    return {
        int(number)
        for block in blocks
        for number in np.unique(group_of[found.coupling.sets.roots(block.nodes.ravel())])
    }


def _mixing_operators(found: Analysis, group_of: Nodes) -> dict[int, set[str]]:
    """Return the operators that mix the channels of each group, by the group's number."""
    operators: dict[int, set[str]] = defaultdict(set)
    for nodes, name in found.coupling.mixed:
        for number in np.unique(group_of[found.coupling.sets.roots(nodes)]).tolist():
            operators[number].add(name)
    return operators
