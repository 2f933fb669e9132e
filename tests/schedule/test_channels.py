"""The number of units that a level has of each group, and the order of their importance."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestify.model.graph.groups import Group, Member
from nestify.recipe.levels import Level
from nestify.schedule.channels import channel_counts, importance_orders


def group(units: int, per_unit: int = 1, name: str = "w", dim: int = 0) -> Group:
    indices = np.arange(units * per_unit).reshape(units, per_unit)
    return Group(units=units, members=(Member(name, dim, indices),), mixed=())


def levels(*widths: float) -> list[Level]:
    return [Level(f"l{k}", 0.0, width=width) for k, width in enumerate(widths)]


@pytest.mark.parametrize(
    ("units", "per_unit", "width", "count"),
    [
        (64, 1, 0.5, 32),
        (64, 1, 0.3, 24),  # 16 would be less than 0.9 * 19.2
        (100, 1, 0.5, 48),  # 50, rounded to a multiple of 8
        (100, 1, 1.0, 100),
        (12, 64, 0.5, 6),  # heads of 64 channels
        (3, 64, 0.5, 2),
        (3, 64, 0.1, 1),
        (10, 1, 0.5, 5),  # too few for multiples of 8
        (32, 4, 0.25, 8),  # groups of four: two are eight channels
    ],
)
def test_counts_of_units(units: int, per_unit: int, width: float, count: int) -> None:
    assert channel_counts([group(units, per_unit)], levels(width, 1.0), 8) == [(count,), (units,)]


@given(
    st.lists(st.tuples(st.integers(2, 500), st.sampled_from([1, 3, 8, 64])), min_size=1, max_size=5),
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=5),
    st.sampled_from([1, 8, 16]),
)
def test_levels_nest_and_have_about_their_share(
    groups: list[tuple[int, int]], widths: list[float], divisor: int
) -> None:
    made = [group(*each) for each in groups]
    counts = channel_counts(made, levels(*sorted(widths), 1.0), divisor)
    assert counts[-1] == tuple(units for units, _ in groups)
    for lower, higher in pairwise(counts):
        assert all(1 <= a <= b for a, b in zip(lower, higher, strict=True))
    for width, found in zip(sorted(widths), counts, strict=False):
        for count, (units, _) in zip(found, groups, strict=True):
            assert 0.9 * width * units - 1 <= count <= width * units + divisor


def test_units_with_the_largest_weights_are_most_important() -> None:
    weight = torch.zeros(4, 2, 1, 1)
    weight[:, 0, 0, 0] = torch.tensor([1.0, -3.0, 2.0, 0.0])
    [order] = importance_orders([group(4)], {"w": weight, "other": torch.ones(4)})
    assert order.tolist() == [1, 2, 0, 3]


def test_every_tensor_of_a_group_has_the_same_influence() -> None:
    """NumPy computes the expected order: by the sum over tensors of each unit's share of squared weights."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((6, 5)) * 100, rng.standard_normal((7, 12))
    members = (
        Member("first", 0, np.arange(6).reshape(6, 1)),
        Member("second", 1, np.array([[u, u + 6] for u in range(6)])),
        Member("bias", 0, np.arange(6).reshape(6, 1)),
    )
    tensors = {"first": torch.tensor(first), "second": torch.tensor(second), "bias": torch.randn(6)}
    [order] = importance_orders([Group(6, members, ())], tensors)
    a = (first**2).sum(1)
    b = (second**2).sum(0).reshape(2, 6).sum(0)
    expected = np.argsort(-(a / a.mean() + b / b.mean()))
    assert order.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("bn1.weight", True),
        ("ls1.gamma", True),
        ("gamma_1", True),
        ("bn1.bias", False),
        ("attn.q_bias", False),
        ("bn1.running_mean", False),
        ("bn1.running_var", False),
    ],
)
def test_scales_count_and_offsets_do_not(name: str, counts: bool) -> None:
    """All weights are equal, so that the order is that of the vector, or stays as it is."""
    members = tuple(Member(each, 0, np.arange(4).reshape(4, 1)) for each in ("conv.weight", name))
    tensors = {"conv.weight": torch.ones(4, 3, 1, 1), name: torch.tensor([0.5, -2.0, 1.0, 0.1])}
    [order] = importance_orders([Group(4, members, ())], tensors)
    assert order.tolist() == ([1, 2, 0, 3] if counts else [0, 1, 2, 3])
