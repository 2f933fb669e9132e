"""Labels that assign a channel to every index of a tensor, and the algebra that operator rules use on them.

A tensor's labels consist of blocks. A block covers one or more dimensions and holds one union-find node per
index of their product. A dimension that no block covers is always kept in full.

After a reshape from C to (heads, head_dim) a block covers both dimensions: every channel keeps its own node,
and nothing is tied yet. In the end, the kept part of a tensor must be a box, so a block of several dimensions
is tied along all of them but one: early, by an operator that determines which one (attention keeps or drops
complete heads), or at the end of the analysis.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from nestify.model.graph.union_find import FROZEN, Nodes, UnionFind

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NodeBlock:
    """Nodes for every index of the product of some dimensions.

    Attributes:
        dims: the dimensions, ascending.
        nodes: union-find nodes; the shape is the extents of `dims`.
    """

    dims: tuple[int, ...]
    nodes: Nodes


@dataclass(frozen=True)
class ChannelLabels:
    """The labels of a tensor.

    Attributes:
        shape: the shape of the tensor.
        blocks: the blocks of nodes; no two share a dimension.
    """

    shape: Shape
    blocks: tuple[NodeBlock, ...] = ()

    @property
    def ndim(self) -> int:
        """Number of dimensions of the tensor."""
        return len(self.shape)

    def block_of(self, dim: int) -> NodeBlock | None:
        """Return the block that covers a dimension (negative: from the end); None if it is kept in full."""
        dim %= max(self.ndim, 1)
        return next((block for block in self.blocks if dim in block.dims), None)

    def nodes_of(self, dim: int) -> Nodes:
        """Return the (extent,) nodes of a dimension that shares no block with another dimension."""
        block = self.block_of(dim)
        if block is None:
            return np.full(self.shape[dim], FROZEN, dtype=np.int64)
        assert len(block.dims) == 1
        return block.nodes

    def is_live(self, dim: int) -> bool:
        """Whether a block covers the dimension, so that some of its indices may be dropped."""
        return self.block_of(dim) is not None

    def move_dims(self, shape: Shape, new_dim: Callable[[int], int | None]) -> "ChannelLabels":
        """Return the labels of a tensor with the same dimensions in other positions.

        Args:
            shape: the new shape.
            new_dim: maps a dimension to its new position; None removes it together with its block.
        """
        blocks = []
        for block in self.blocks:
            places = [new_dim(dim) for dim in block.dims]
            kept = [place for place in places if place is not None]
            if len(kept) < len(places):
                assert not kept
                continue
            order = np.argsort(kept)
            blocks.append(NodeBlock(tuple(kept[k] for k in order), block.nodes.transpose(order)))
        return ChannelLabels(shape, tuple(blocks))


def make_labels(shape: Shape, nodes: dict[int, Nodes]) -> ChannelLabels:
    """Make labels in which every dimension has a block of its own.

    Args:
        shape: the shape of the tensor.
        nodes: maps a dimension to its (extent,) nodes. A dimension with one index or only
            frozen nodes gets no block.
    """
    blocks = []
    for dim, array in sorted(nodes.items()):
        assert array.shape == (shape[dim],)
        if shape[dim] > 1 and bool((array != FROZEN).any()):
            blocks.append(NodeBlock((dim,), array))
    return ChannelLabels(shape, tuple(blocks))


class Algebra:
    """Operations on labels, which may tie channels.

    Attributes:
        sets: the channels that are tied so far.
    """

    def __init__(self) -> None:
        self.sets = UnionFind()

    def fresh(self, shape: Shape) -> ChannelLabels:
        """Return labels of a new tensor with a new node for every index of each dimension longer than 1."""
        return make_labels(shape, {d: self.sets.fresh(n) for d, n in enumerate(shape) if n > 1})

    def freeze(self, labels: ChannelLabels, dims: Iterable[int] | None = None) -> ChannelLabels:
        """Keep dimensions in full (all of them by default), and return the labels without their blocks."""
        chosen = set(range(labels.ndim)) if dims is None else {dim % labels.ndim for dim in dims}
        kept = []
        for block in labels.blocks:
            if chosen.isdisjoint(block.dims):
                kept.append(block)
            else:
                self.sets.freeze(block.nodes)
        return ChannelLabels(labels.shape, tuple(kept))

    def simplify(self, labels: ChannelLabels) -> ChannelLabels:
        """Return the labels without frozen blocks, and without dimensions along which a block is constant."""
        blocks = (self.simple_block(block) for block in labels.blocks)
        return ChannelLabels(labels.shape, tuple(block for block in blocks if block is not None))

    def simple_block(self, block: NodeBlock) -> NodeBlock | None:
        """Return the block without dimensions along which it is constant; None if it is frozen."""
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
        """Tie blocks so that none of these dimensions shares a block with another dimension.

        A block is tied along its dimensions that are in `dims`, and then covers only the rest. If all of its
        dimensions are in `dims`, it then covers the outermost. A block of one dimension stays as it is.
        """
        chosen = {dim % labels.ndim for dim in dims}
        blocks = []
        for block in labels.blocks:
            axes = [k for k, dim in enumerate(block.dims) if dim in chosen]
            if len(block.dims) == 1 or not axes:
                blocks.append(block)
                continue
            rest = [k for k in range(len(block.dims)) if k not in axes]
            if not rest:
                rest = axes[:1]
            blocks.append(self._tie_all_but(block, rest))
        return ChannelLabels(labels.shape, tuple(blocks))

    def _tie_all_but(self, block: NodeBlock, rest: Sequence[int]) -> NodeBlock:
        """Tie the nodes along all axes but `rest`, and return a block of the remaining dimensions."""
        kept = [block.nodes.shape[k] for k in rest]
        others = [k for k in range(block.nodes.ndim) if k not in rest]
        nodes = block.nodes.transpose([*rest, *others]).reshape(*kept, -1)
        self.sets.union(nodes[..., :1], nodes)
        return NodeBlock(tuple(block.dims[k] for k in rest), nodes[..., 0])

    def broadcast(self, operands: Sequence[ChannelLabels], shape: Shape) -> ChannelLabels:
        """Return the labels of an elementwise operation's result; indices that are combined are tied.

        Args:
            operands: labels of tensors that can be broadcast.
            shape: the shape of the result.
        """
        aligned = [self._align(self.simplify(labels), shape) for labels in operands]
        components = _components([block.dims for labels, _ in aligned for block in labels.blocks])
        blocks = []
        for dims in components:
            block = self._tie_component(dims, aligned)
            if block is not None:
                blocks.append(block)
        return ChannelLabels(shape, tuple(blocks))

    def _align(self, labels: ChannelLabels, shape: Shape) -> tuple[ChannelLabels, frozenset[int]]:
        """Return the labels in the dimensions of the result, and the dimensions that are not broadcast."""
        shift = len(shape) - labels.ndim
        covered = frozenset(d + shift for d, n in enumerate(labels.shape) if n == shape[d + shift])
        return labels.move_dims(shape, lambda dim: dim + shift), covered

    def _tie_component(
        self, dims: tuple[int, ...], operands: Sequence[tuple[ChannelLabels, frozenset[int]]]
    ) -> NodeBlock | None:
        """Tie the operands' blocks along dimensions that blocks connect; return the block of the result."""
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
                    nodes = self._tie_all_but(block, [block.dims.index(live)]).nodes
                    first = nodes if first is None else first
                    self.sets.union(first, nodes)
                elif not set(block.dims).isdisjoint(dims):
                    self.sets.freeze(block.nodes)
        return None if first is None or live is None else NodeBlock((live,), first)

    def reshape(self, labels: ChannelLabels, shape: Shape) -> ChannelLabels:
        """Return the labels after a reshape; every element keeps its node."""
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
            block = self._keep_largest(
                [block for block in labels.blocks if not set(old).isdisjoint(block.dims)]
            )
            axes = [labels.shape[dim] if dim in block.dims else 1 for dim in old]
            full = np.broadcast_to(block.nodes.reshape(axes), [labels.shape[dim] for dim in old])
            blocks.append(NodeBlock(new, full.reshape([shape[dim] for dim in new])))
        return self.simplify(ChannelLabels(shape, tuple(blocks)))

    def _keep_largest(self, blocks: list[NodeBlock]) -> NodeBlock:
        """Return the block with the most channels; freeze the rest, as one axis cannot hold two blocks."""
        best = max(blocks, key=lambda block: len(np.unique(self.sets.roots(block.nodes))))
        for block in blocks:
            if block is not best:
                self.sets.freeze(block.nodes)
        return best


def _components(sets: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Merge sets that share a member, and sort each result."""
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
    """Split both shapes into the shortest runs of dimensions whose products are equal."""
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
