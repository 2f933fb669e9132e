"""The algebra of labels agrees with NumPy."""

from itertools import pairwise
from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nestify.model.graph.labels import Algebra, NodeBlock, Shape, make_labels
from tests.model.graph.masks import mask_of, new_labels, some_kept


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[Shape, Shape]:
    """Draw two shapes of the same size, a product of small factors."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3]), min_size=1, max_size=6))
    shapes = []
    for _ in range(2):
        cuts = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=4)))
        ends = [0, *cuts, len(factors)]
        shapes.append(tuple(prod(factors[a:b]) for a, b in pairwise(ends)))
    return shapes[0], shapes[1]


@given(reshapes(), st.data())
def test_a_reshape_carries_every_element(shapes: tuple[Shape, Shape], data: st.DataObject) -> None:
    old, new = shapes
    live = data.draw(st.sets(st.integers(0, len(old) - 1)))
    algebra = Algebra()
    labels = make_labels(old, {d: algebra.sets.fresh(old[d]) for d in live})
    found = algebra.reshape(labels, new)
    back = algebra.reshape(found, old)
    assert found.shape == new
    for seed in range(4):
        kept = some_kept(algebra, seed)  # drawn after the reshapes, so that sets that they froze are kept
        expected = mask_of(algebra, labels, kept)
        assert np.array_equal(mask_of(algebra, found, kept), expected.reshape(new))
        assert np.array_equal(mask_of(algebra, back, kept), expected)


@given(reshapes())
def test_a_reshape_of_one_dimension_ties_and_freezes_nothing(shapes: tuple[Shape, Shape]) -> None:
    algebra = Algebra()
    nodes = algebra.sets.fresh(prod(shapes[0]))
    labels = algebra.reshape(algebra.reshape(make_labels((len(nodes),), {0: nodes}), shapes[0]), shapes[1])
    assert np.array_equal(algebra.sets.roots(nodes), nodes)
    (block,) = labels.blocks or (NodeBlock((), nodes),)
    assert np.array_equal(block.nodes.ravel(), nodes)


@given(st.lists(st.integers(2, 3), min_size=1, max_size=3), st.data())
def test_indices_that_are_combined_are_kept_together(extents: list[int], data: st.DataObject) -> None:
    """Each operand keeps the same indices as the result along the dimensions that are not broadcast."""
    algebra = Algebra()
    operands = []
    for _ in range(data.draw(st.integers(1, 3))):
        own = tuple(n if data.draw(st.booleans()) else 1 for n in extents)
        live = data.draw(st.sets(st.integers(0, len(own) - 1)))
        operands.append(new_labels(algebra, own, live, data.draw(st.booleans())))
    shape = np.broadcast_shapes(*(operand.shape for operand in operands))
    found = algebra.broadcast(operands, shape)
    assert found.shape == shape
    for seed in range(4):
        kept = some_kept(algebra, seed)
        result = mask_of(algebra, found, kept)
        for operand in operands if result.any() else ():
            spread = tuple(d for d, n in enumerate(shape) if operand.shape[d] < n)
            assert np.array_equal(result.any(spread, keepdims=True), mask_of(algebra, operand, kept))


@given(reshapes(), st.data())
def test_tied_dimensions_share_no_block(shapes: tuple[Shape, Shape], data: st.DataObject) -> None:
    old, new = shapes
    algebra = Algebra()
    labels = algebra.reshape(make_labels((prod(old),), {0: algebra.sets.fresh(prod(old))}), new)
    dim = data.draw(st.integers(0, len(new) - 1))
    tied = algebra.tie_along(labels, [dim])
    assert all(block.dims == (dim,) or dim not in block.dims for block in tied.blocks)
    kept = some_kept(algebra, 0)
    assert np.array_equal(mask_of(algebra, tied, kept), mask_of(algebra, labels, kept))
