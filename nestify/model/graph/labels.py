"""Which channel each index of a tensor's dimensions is: the algebra that the operator rules are written in.

A tensor's labels are a few blocks. A block covers one or more dimensions and holds one union-find node per
index of their product. A dimension in no block is whole: all of it is always kept.

After a reshape from C to (heads, head_dim) a block covers both dimensions: every channel keeps its own node,
and nothing is tied yet. What is kept of a tensor must be a box in the end, so a block of several dimensions
is tied to one of them: early, by an operator that knows which (attention keeps heads whole), or at the end
of the analysis.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from nestify.model.graph.union_find import WHOLE, Nodes, UnionFind

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NodeBlock:
    """Nodes of the product of some dimensions: `nodes.shape` is their extents, `dims` ascends."""

    dims: tuple[int, ...]
    nodes: Nodes


@dataclass(frozen=True)
class ChannelLabels:
    """The labels of a tensor of this shape; no two blocks share a dimension."""

    shape: Shape
    blocks: tuple[NodeBlock, ...] = ()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def block_of(self, dim: int) -> NodeBlock | None:
        """The block that covers a dimension (negative counts from the end); None where it is whole."""
        dim %= max(self.ndim, 1)
        return next((block for block in self.blocks if dim in block.dims), None)

    def nodes_of(self, dim: int) -> Nodes:
        """(extent,) nodes of a dimension that has a block of its own or none."""
        block = self.block_of(dim)
        if block is None:
            return np.full(self.shape[dim], WHOLE, dtype=np.int64)
        assert len(block.dims) == 1
        return block.nodes

    def is_live(self, dim: int) -> bool:
        return self.block_of(dim) is not None

    def mapped(self, shape: Shape, where: Callable[[int], int | None]) -> "ChannelLabels":
        """Move dimensions: `where` gives the new place of one, None where it is gone with its block."""
        blocks = []
        for block in self.blocks:
            places = [where(dim) for dim in block.dims]
            kept = [place for place in places if place is not None]
            if len(kept) < len(places):
                assert not kept
                continue
            order = np.argsort(kept)
            blocks.append(NodeBlock(tuple(kept[k] for k in order), block.nodes.transpose(order)))
        return ChannelLabels(shape, tuple(blocks))


def of_dims(shape: Shape, nodes: dict[int, Nodes]) -> ChannelLabels:
    """Labels whose dimensions each have a block of their own; extents of 1 and whole ones get none."""
    blocks = []
    for dim, array in sorted(nodes.items()):
        assert array.shape == (shape[dim],)
        if shape[dim] > 1 and bool((array != WHOLE).any()):
            blocks.append(NodeBlock((dim,), array))
    return ChannelLabels(shape, tuple(blocks))


class Algebra:
    """Operations on labels that may tie channels."""

    def __init__(self) -> None:
        self.sets = UnionFind()

    def fresh(self, shape: Shape) -> ChannelLabels:
        """Labels of a new tensor whose dimensions are free."""
        return of_dims(shape, {d: self.sets.fresh(n) for d, n in enumerate(shape) if n > 1})

    def freeze(self, labels: ChannelLabels, dims: Iterable[int] | None = None) -> ChannelLabels:
        """Keep dimensions whole (all of them by default)."""
        chosen = set(range(labels.ndim)) if dims is None else {dim % labels.ndim for dim in dims}
        kept = []
        for block in labels.blocks:
            if chosen.isdisjoint(block.dims):
                kept.append(block)
            else:
                self.sets.freeze(block.nodes)
        return ChannelLabels(labels.shape, tuple(kept))

    def simplify(self, labels: ChannelLabels) -> ChannelLabels:
        """Drop blocks that are frozen, and dimensions along which a block does not change."""
        blocks = (self.simple_block(block) for block in labels.blocks)
        return ChannelLabels(labels.shape, tuple(block for block in blocks if block is not None))

    def simple_block(self, block: NodeBlock) -> NodeBlock | None:
        roots, nodes = self.sets.roots(block.nodes), block.nodes
        if not roots.any():
            return None
        if len(block.dims) == 1:
            return block
        dims: list[int] = []
        for axis in reversed(range(len(block.dims))):
            if bool((roots == roots.take([0], axis)).all()):
                roots, nodes = roots.take([0], axis).squeeze(axis), nodes.take([0], axis).squeeze(axis)
            else:
                dims.insert(0, block.dims[axis])
        return NodeBlock(tuple(dims), nodes) if dims else NodeBlock(block.dims[:1], self._constant(block))

    def _constant(self, block: NodeBlock) -> Nodes:
        return np.full(block.nodes.shape[0], block.nodes.flat[0])

    def tie_along(self, labels: ChannelLabels, dims: Iterable[int]) -> ChannelLabels:
        """Make dimensions whole where they share a block with others; alone they stay as they are."""
        chosen = {dim % labels.ndim for dim in dims}
        blocks = []
        for block in labels.blocks:
            axes = [k for k, dim in enumerate(block.dims) if dim in chosen]
            if len(block.dims) == 1 or not axes:
                blocks.append(block)
                continue
            rest = [k for k in range(len(block.dims)) if k not in axes]
            if not rest:  # all of them must be separate: the outermost stays
                rest = axes[:1]
            blocks.append(self._tied(block, rest))
        return ChannelLabels(labels.shape, tuple(blocks))

    def _tied(self, block: NodeBlock, rest: Sequence[int]) -> NodeBlock:
        """Union over all axes but `rest`, which stay."""
        kept = [block.nodes.shape[k] for k in rest]
        others = [k for k in range(block.nodes.ndim) if k not in rest]
        nodes = block.nodes.transpose([*rest, *others]).reshape(*kept, -1)
        self.sets.union(nodes[..., :1], nodes)
        return NodeBlock(tuple(block.dims[k] for k in rest), nodes[..., 0])

    def broadcast(self, operands: Sequence[ChannelLabels], shape: Shape) -> ChannelLabels:
        """Labels of an elementwise operation: indices that meet are tied."""
        aligned = [self._aligned(self.simplify(labels), shape) for labels in operands]
        components = _components([block.dims for labels, _ in aligned for block in labels.blocks])
        blocks = []
        for dims in components:
            block = self._meet(dims, aligned)
            if block is not None:
                blocks.append(block)
        return ChannelLabels(shape, tuple(blocks))

    def _aligned(self, labels: ChannelLabels, shape: Shape) -> tuple[ChannelLabels, frozenset[int]]:
        """Labels with the dimensions of the result, and the dimensions that are not broadcast."""
        shift = len(shape) - labels.ndim
        covered = frozenset(d + shift for d, n in enumerate(labels.shape) if n == shape[d + shift])
        return labels.mapped(shape, lambda dim: dim + shift), covered

    def _meet(
        self, dims: tuple[int, ...], operands: Sequence[tuple[ChannelLabels, frozenset[int]]]
    ) -> NodeBlock | None:
        """Tie what the operands have along dimensions that some block connects."""
        present = [(labels, covered) for labels, covered in operands if not covered.isdisjoint(dims)]
        found = [block for labels, _ in present for block in labels.blocks if block.dims == dims]
        if len(found) == len(present):
            for block in found[1:]:
                self.sets.union(found[0].nodes, block.nodes)
            return found[0]
        whole = {d for labels, covered in present for d in covered if not labels.is_live(d)}
        candidates = [dim for dim in dims if dim not in whole]
        live = candidates[-2] if len(candidates) > 1 else candidates[0] if candidates else None
        first: Nodes | None = None
        for labels, _ in present:
            for block in labels.blocks:
                if live is not None and live in block.dims:
                    nodes = self._tied(block, [block.dims.index(live)]).nodes
                    first = nodes if first is None else first
                    self.sets.union(first, nodes)
                elif not set(block.dims).isdisjoint(dims):
                    self.sets.freeze(block.nodes)
        return None if first is None or live is None else NodeBlock((live,), first)

    def reshape(self, labels: ChannelLabels, shape: Shape) -> ChannelLabels:
        """Carry the labels through a reshape; every index keeps its node."""
        if labels.shape == shape:
            return labels
        assert prod(labels.shape) == prod(shape)
        labels = self.simplify(labels)
        groups = _reshape_groups(labels.shape, shape)
        linked = _components(
            [
                tuple(i for i, g in enumerate(groups) if not set(g[0]).isdisjoint(b.dims))
                for b in labels.blocks
            ]
        )
        blocks = []
        for numbers in linked:
            old = tuple(dim for k in numbers for dim in groups[k][0])
            new = tuple(dim for k in numbers for dim in groups[k][1] if shape[dim] > 1)
            block = self._only([block for block in labels.blocks if not set(old).isdisjoint(block.dims)])
            axes = [labels.shape[dim] if dim in block.dims else 1 for dim in old]
            full = np.broadcast_to(block.nodes.reshape(axes), [labels.shape[dim] for dim in old])
            blocks.append(NodeBlock(new, full.reshape([shape[dim] for dim in new])))
        return self.simplify(ChannelLabels(shape, tuple(blocks)))

    def _only(self, blocks: list[NodeBlock]) -> NodeBlock:
        """The block with the most channels; the others are kept whole, as one axis cannot hold two."""
        best = max(blocks, key=lambda block: len(np.unique(self.sets.roots(block.nodes))))
        for block in blocks:
            if block is not best:
                self.sets.freeze(block.nodes)
        return best


def _components(sets: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Merge sets that share a member; each result is sorted."""
    merged: list[set[int]] = []
    for members in sets:
        new = set(members)
        apart = []
        for other in merged:
            if new.isdisjoint(other):
                apart.append(other)
            else:
                new |= other
        merged = [*apart, new]
    return sorted(tuple(sorted(members)) for members in merged)


def _reshape_groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions whose products agree."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left: list[int] = []
        right: list[int] = []
        a = b = 1
        while not left or not right or a != b:
            if (a <= b and i < len(old) and not (left and a == b)) or j >= len(new):
                if i >= len(old):
                    break
                left.append(i)
                a *= old[i]
                i += 1
            else:
                right.append(j)
                b *= new[j]
                j += 1
        groups.append((left, right))
    return groups
