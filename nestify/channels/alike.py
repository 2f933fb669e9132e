"""Which sets of channels are alike, so that they can change places and any number of them can be kept.

Channels in the same weights may still be treated differently on their way: half of them go through an
activation, the others do not; or a constant that no state dict holds multiplies each by another number. So
two sets are alike only where every tensor of the graph has as many channels of each, in the same roles and
the same order, and every constant the same values.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from nestify.channels.analysis import Analysis, all_labels
from nestify.channels.union_find import WHOLE, Nodes, UnionFind


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
