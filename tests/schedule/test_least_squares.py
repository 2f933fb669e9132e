"""Least squares of shared weights, compared with NumPy's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestify.schedule.least_squares import Equations, solve


def whole(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(index) for index in np.ix_(*map(range, shape)))


def equations(
    inputs: Tensor, outputs: Tensor, mask: Tensor, places: tuple[Tensor, ...], importance: float = 1.0
) -> Equations:
    """Make the equations of inputs (groups, positions, c) and outputs (groups, positions, o)."""
    gram, products = inputs.transpose(1, 2) @ inputs, outputs.transpose(1, 2) @ inputs
    return Equations(gram, products, places, mask, importance)


@pytest.mark.parametrize("groups", [1, 3])
def test_kept_weights_are_numpys(groups: int) -> None:
    """Each output channel is solved by NumPy alone, from the columns that its mask keeps."""
    rng = np.random.default_rng(groups)
    x, z = rng.normal(size=(groups, 50, 8)), rng.normal(size=(groups, 50, 2))
    start, keep = rng.normal(size=(groups * 2, 8)), rng.random((groups * 2, 8)) < 0.6
    free = keep & (rng.random(keep.shape) < 0.7)
    expected = start.copy()
    for row in range(groups * 2):
        group, own = row // 2, free[row]
        fixed = keep[row] & ~own
        rest = z[group, :, row % 2] - x[group][:, fixed] @ start[row, fixed]
        expected[row, own] = np.linalg.lstsq(x[group][:, own], rest, rcond=None)[0]
    mask = torch.tensor(keep)
    made = equations(torch.tensor(x), torch.tensor(z), mask, whole(start.shape))
    found = solve(torch.tensor(start), torch.tensor(free), [made], 100)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)


def test_two_networks_are_weighed_against_each_other() -> None:
    """The second network has all columns, and three times the importance: a stacked NumPy problem."""
    rng = np.random.default_rng(0)
    narrow, wide, z, y = (rng.normal(size=(40, n)) for n in (3, 5, 1, 1))
    start = torch.tensor(rng.normal(size=(1, 5)))
    small = torch.tensor([[True, False, True, True, False]])
    places = tuple(torch.tensor(index) for index in np.ix_([0], [0, 2, 3]))
    first = equations(torch.tensor(narrow[None]), torch.tensor(z[None]), small, places)
    second = equations(
        torch.tensor(wide[None]), torch.tensor(y[None]), torch.ones_like(small), whole((1, 5)), 3.0
    )
    rows = np.zeros((40, 5))
    rows[:, [0, 2, 3]] = narrow
    stacked = np.concatenate([rows, np.sqrt(3) * wide]), np.concatenate([z, np.sqrt(3) * y])
    expected = np.linalg.lstsq(*stacked, rcond=None)[0].T
    found = solve(start, torch.ones_like(small), [first, second], 100)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


def test_a_pull_holds_weights_at_their_start() -> None:
    """Six weights, three positions: NumPy solves the same with a row per weight below the inputs."""
    rng = np.random.default_rng(3)
    x, z = rng.normal(size=(3, 6)), rng.normal(size=(3, 1))
    start, pull = rng.normal(size=(1, 6)), rng.uniform(0.1, 2, size=(1, 6))
    roots = np.sqrt(pull)
    stacked = np.concatenate([x, np.diag(roots[0])]), np.concatenate([z, (roots * start).T])
    expected = np.linalg.lstsq(*stacked, rcond=None)[0].T
    everywhere = torch.ones(1, 6, dtype=torch.bool)
    made = equations(torch.tensor(x[None]), torch.tensor(z[None]), everywhere, whole((1, 6)))
    found = solve(torch.tensor(start), everywhere, [made], 100, torch.tensor(pull))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 12), st.integers(1, 6), st.integers(0, 4))
def test_the_error_never_increases(seed: int, groups: int, positions: int, c: int, iterations: int) -> None:
    """Also with fewer positions than weights, and when the iterations end early; fixed weights stay."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, positions, c, generator=generator)
    z = torch.randn(groups, positions, 2, generator=generator)
    start = torch.randn(groups * 2, c, generator=generator)
    mask = torch.rand(start.shape, generator=generator) < 0.7
    free = mask & (torch.rand(start.shape, generator=generator) < 0.7)
    made = equations(x, z, mask, whole(tuple(start.shape)))
    found = solve(start, free, [made], iterations)

    def error(weight: Tensor) -> float:
        rows = (weight * mask).view(groups, 2, c)
        return float((z - x @ rows.transpose(1, 2)).square().sum())

    assert error(found) <= error(start) * (1 + 1e-4) + 1e-4
    assert torch.equal(found[~free], start[~free])


def test_inputs_that_are_always_zero_change_nothing() -> None:
    start = torch.randn(2, 3)
    x, z = torch.zeros(1, 4, 3), torch.randn(1, 4, 2)
    everywhere = torch.ones(2, 3, dtype=torch.bool)
    made = equations(x, z, everywhere, whole((2, 3)))
    assert torch.equal(solve(start, everywhere, [made], 10), start)
