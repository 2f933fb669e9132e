"""Coupled channel groups: which indices of which tensors one unit is."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nestify.model.graph.analysis import Analysis, all_labels
from nestify.model.graph.labels import ChannelLabels
from nestify.model.graph.union_find import WHOLE, Nodes, UnionFind


def alike_sets(found: Analysis) -> list[Nodes]:
    """Roots (units,) of the sets of each kind, ascending; kinds of one set aside, in the graph's order."""
    sets = found.coupling.sets
    kinds = np.zeros(len(sets), dtype=np.int64)  # by root
    for nodes, marks in _marked(found):
        _part(kinds, sets.roots(nodes), marks)
    roots = np.unique(sets.roots(np.arange(len(sets))))
    roots = roots[roots != WHOLE]
    order = np.argsort(kinds[roots], kind="stable")
    starts = np.flatnonzero(np.diff(kinds[roots][order])) + 1
    parts = [part for part in np.split(roots[order], starts) if len(part) > 1]
    return sorted(parts, key=lambda part: int(part[0]))


def _marked(found: Analysis) -> Iterator[tuple[Nodes, Nodes]]:
    """Channels of every tensor in the order of its elements, and what tells them apart within a set."""
    roles = _roles(found.coupling.sets)
    blocks = {id(block.nodes): block for labels in all_labels(found) for block in labels.blocks}
    for block in blocks.values():
        nodes = block.nodes.ravel()
        yield nodes, roles[nodes]
    for node, name in found.traced.names.items():
        if name in found.traced.constants:
            for block in found.labels[node].blocks:
                yield block.nodes, _values(found.traced.constants[name], block.dims[0])


def _roles(sets: UnionFind) -> Nodes:
    """(nodes,) the same number for nodes that came into being together, as the n-th of their sets there."""
    roots, origins = sets.roots(np.arange(len(sets))), sets.origins
    order = np.lexsort((origins, roots))  # stable: nodes ascend where both are the same
    begins = np.diff(roots[order], prepend=-1).astype(bool) | np.diff(origins[order], prepend=-1).astype(bool)
    places = np.arange(len(order))
    nth = places - np.maximum.accumulate(np.where(begins, places, 0))
    roles = np.empty_like(order)
    roles[order] = origins[order] * len(order) + nth
    return roles


def _values(constant: Tensor, dim: int) -> Nodes:
    """(extent,) the same number for indices at which a constant is the same; unknown values all differ."""
    if constant.is_meta:
        return np.arange(constant.shape[dim])
    rows = constant.movedim(dim, 0).reshape(constant.shape[dim], -1).cpu()
    return np.asarray(torch.unique(rows, dim=0, return_inverse=True)[1].numpy(), dtype=np.int64)


def _part(kinds: Nodes, roots: Nodes, marks: Nodes) -> None:
    """Part the sets of each kind by the marks that they have in one tensor, in its order."""
    order = np.argsort(roots, kind="stable")
    names, starts, counts = np.unique(roots[order], return_index=True, return_counts=True)
    for count in np.unique(counts[names != WHOLE]):
        chosen = (counts == count) & (names != WHOLE)
        rows = marks[order][starts[chosen][:, None] + np.arange(count)]
        marked = np.column_stack([kinds[names[chosen]], rows])
        new = np.unique(marked, axis=0, return_inverse=True)[1]
        kinds[names[chosen]] = kinds.max() + 1 + new.ravel()


@dataclass(frozen=True)
class Member:
    """Where a group's units are in one tensor.

    Attributes:
        name: of the tensor, as in `Traced.names`.
        dim: the dimension that holds the units.
        indices: (units, channels per unit); row u is unit u, ascending.
    """

    name: str
    dim: int
    indices: NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Units of which any number may be kept; whatever is kept of one member is kept of all.

    Attributes:
        units: how many there are, at least 2.
        members: every (tensor, dimension) that has channels of them, in the order of the graph.
        mixed: operators (norms) that compute with all channels together, so that dropping one changes
            what the others become; empty where dropping is the same as zeroing.
    """

    units: int
    members: tuple[Member, ...]
    mixed: tuple[str, ...]


@dataclass(frozen=True)
class _Along:
    """A dimension of a parameter, buffer or constant, and the nodes (extent,) along it."""

    name: str
    dim: int
    nodes: Nodes


def find_groups(found: Analysis) -> list[tuple[Group, Nodes]]:
    """Groups, each with the (units,) roots of its units, in the order of the graph."""
    parts = alike_sets(found)
    group_of = np.full(len(found.coupling.sets), -1)
    for number, roots in enumerate(parts):
        group_of[roots] = number
    members: list[list[Member]] = [[] for _ in parts]
    for along in _dimensions(found):
        roots = found.coupling.sets.roots(along.nodes)
        for number in np.unique(group_of[roots]).tolist():
            if number >= 0:
                members[number].append(Member(along.name, along.dim, _rows(roots, parts[number])))
    mixed = _mixed(found, group_of)
    return [
        (Group(len(roots), tuple(members[number]), tuple(sorted(mixed[number]))), roots)
        for number, roots in enumerate(parts)
        if members[number]
    ]


def frozen_dimensions(found: Analysis, groups: Iterable[Nodes]) -> dict[tuple[str, int], str]:
    """Why a dimension of a tensor is, in whole or in part, in no group: (name, dim) -> reason.

    Args:
        groups: roots of the groups' units.
    """
    sets = found.coupling.sets
    in_group = np.zeros(len(sets), dtype=bool)
    for roots in groups:
        in_group[roots] = True
    reasons = {}
    for along in _dimensions(found):
        left_out = ~in_group[sets.roots(along.nodes)]
        if left_out.any():
            found_reasons = sets.reasons(along.nodes[left_out])
            reasons[along.name, along.dim] = "; ".join(found_reasons) or "no other channel is like it"
    return reasons


def _dimensions(found: Analysis) -> Iterator[_Along]:
    """Every dimension of a placeholder with more than one index, the images' aside."""
    for node, name in found.traced.names.items():
        labels: ChannelLabels = found.labels[node]
        for dim, extent in enumerate(labels.shape):
            if extent > 1:
                yield _Along(name, dim, labels.nodes_of(dim))


def _rows(along: Nodes, roots: Nodes) -> Nodes:
    """(units, count) places of each root along a dimension, ascending; read-only."""
    places = np.flatnonzero(np.isin(along, roots))
    rows = places[np.argsort(along[places], kind="stable")].reshape(len(roots), -1)
    rows.setflags(write=False)
    return rows


def _mixed(found: Analysis, group_of: Nodes) -> dict[int, set[str]]:
    """Operators that mix the channels of a group, by its number."""
    operators: dict[int, set[str]] = defaultdict(set)
    for nodes, name in found.coupling.mixed:
        for number in np.unique(group_of[found.coupling.sets.roots(nodes)]).tolist():
            operators[number].add(name)
    return operators
