"""The union-find agrees with sets that are merged one by one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nestify.model.graph.union_find import FROZEN, UnionFind

COUNT = 12
node = st.integers(0, COUNT)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("union"), st.lists(st.tuples(node, node), max_size=6)),
        st.tuples(st.just("freeze"), st.lists(st.tuples(node, node), max_size=2)),
    ),
    max_size=8,
)


def merge(history: list[tuple[str, list[tuple[int, int]]]]) -> list[set[int]]:
    """Merge sets by brute force; the set that contains `FROZEN` contains all frozen nodes."""
    sets = [{k} for k in range(COUNT + 1)]
    for what, pairs in history:
        for first, second in pairs if what == "union" else [(a, FROZEN) for a, _ in pairs]:
            joined = {k for group in sets if first in group or second in group for k in group}
            sets = [group for group in sets if group.isdisjoint(joined)] + [joined]
    return sets


@given(steps)
def test_sets_agree_with_brute_force(history: list[tuple[str, list[tuple[int, int]]]]) -> None:
    sets = UnionFind()
    sets.fresh(COUNT)
    for what, pairs in history:
        first, second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        if what == "union":
            sets.union(first, second)
        else:
            sets.freeze(first)
    roots = sets.roots(np.arange(COUNT + 1))
    for group in merge(history):
        found = set(roots[sorted(group)].tolist())
        assert found == ({FROZEN} if FROZEN in group else found)
        assert len(found) == 1
        assert found <= group
    assert len(set(roots.tolist())) == len(merge(history))


@given(steps)
def test_exactly_the_frozen_nodes_have_a_reason(history: list[tuple[str, list[tuple[int, int]]]]) -> None:
    sets = UnionFind()
    sets.fresh(COUNT)
    for number, (what, pairs) in enumerate(history):
        first, second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        sets.reason = f"step {number}"
        if what == "union":
            sets.union(first, second)
        else:
            sets.freeze(first)
    frozen = next(group for group in merge(history) if FROZEN in group)
    for k in range(1, COUNT + 1):
        assert bool(sets.reasons(np.array([k]))) == (k in frozen)


def test_the_first_reason_is_kept_and_propagated() -> None:
    sets = UnionFind()
    nodes = sets.fresh(4)
    sets.freeze(nodes[3:], "a roll")
    sets.freeze(nodes[3:], "a flip")
    sets.union(nodes[:3], nodes[1:])
    assert sets.reasons(nodes) == ["a roll"]
    assert not sets.roots(nodes).any()


def test_arrays_are_broadcast() -> None:
    sets = UnionFind()
    rows = sets.fresh(6).reshape(2, 3)
    sets.union(rows[:, :1], rows)
    assert sets.roots(rows).tolist() == [[1, 1, 1], [4, 4, 4]]
