"""A union-find over single channels, on NumPy arrays, with a reason for every set that must be kept."""

import numpy as np
from numpy.typing import NDArray

Nodes = NDArray[np.int64]

FROZEN = 0
"""The node of everything that is always kept: pixels, tokens, the batch, the classes."""


class UnionFind:
    """Sets of channels that must be kept or dropped together.

    Node 0 (`FROZEN`) is always kept. A set that is joined with it is frozen: it is always kept, too.

    Attributes:
        reason: the reason that `freeze` records by default.
        origins: (nodes,) number of the `fresh` call that made each node.
    """

    def __init__(self) -> None:
        self.reason = "always whole"
        self.origins = np.zeros(1, dtype=np.int64)
        self._parent = np.zeros(1, dtype=np.int64)
        self._reasons = ["", self.reason]
        self._why = np.ones(1, dtype=np.int64)  # per root: index into `_reasons`, 0 if not frozen

    def __len__(self) -> int:
        """Return the number of nodes, including `FROZEN`."""
        return len(self._parent)

    def fresh(self, count: int) -> Nodes:
        """Make `count` new nodes, each in a set of its own; returns (count,)."""
        nodes = np.arange(len(self), len(self) + count, dtype=np.int64)
        self.origins = np.concatenate([self.origins, np.full(count, self.origins[-1] + 1)])
        self._parent = np.concatenate([self._parent, nodes])
        self._why = np.concatenate([self._why, np.zeros(count, dtype=np.int64)])
        return nodes

    def roots(self, nodes: Nodes) -> Nodes:
        """Return the root of each node's set, in the shape of `nodes`; `FROZEN` for every frozen set."""
        roots = self._find(nodes)
        return np.where(self._why[roots] > 0, FROZEN, roots)

    def reasons(self, nodes: Nodes) -> list[str]:
        """Return why the nodes are frozen, each reason once; empty if none is frozen."""
        return [self._reasons[k] for k in np.unique(self._why[self._find(nodes)]) if k > 0]

    def union(self, first: Nodes, second: Nodes) -> None:
        """Join the sets of `first[i]` and `second[i]` for every i (the arrays are broadcast)."""
        first, second = (side.ravel() for side in np.broadcast_arrays(first, second))
        self.freeze(first[second == FROZEN])
        self.freeze(second[first == FROZEN])
        live = (first != FROZEN) & (second != FROZEN)
        first, second = first[live], second[live]
        while len(first):
            first, second = self._find(first), self._find(second)
            differ = first != second
            first, second = first[differ], second[differ]
            low, high = np.minimum(first, second), np.maximum(first, second)
            # Several lows may claim the same high: the smallest wins, the rest are joined in the next round.
            np.minimum.at(self._parent, high, low)
            self._pass_on_reasons(high)

    def freeze(self, nodes: Nodes, reason: str | None = None) -> None:
        """Mark the sets of these nodes as always kept.

        Args:
            nodes: nodes, in any shape.
            reason: why they are kept; None uses the attribute `reason`. A set that is frozen already keeps
                its first reason.
        """
        roots = np.unique(self._find(nodes.ravel()))
        roots = roots[self._why[roots] == 0]
        if not len(roots):
            return
        reason = reason or self.reason
        if self._reasons[-1] != reason:
            self._reasons.append(reason)
        self._why[roots] = len(self._reasons) - 1

    def _pass_on_reasons(self, joined: Nodes) -> None:
        """Freeze the sets that frozen former roots have joined, for the same reason."""
        joined = np.unique(joined)
        joined = joined[self._why[joined] > 0]
        roots = self._find(joined)
        clear = self._why[roots] == 0
        self._why[roots[clear]] = self._why[joined[clear]]

    def _find(self, nodes: Nodes) -> Nodes:
        roots = self._parent[nodes]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[nodes] = roots  # path compression
        return roots
