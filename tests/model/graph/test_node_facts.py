"""Reshapes and permutations cancel only if every element is in its place again in NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from nestify.model.graph.node_facts import is_layout, layouts_cancel
from nestify.model.graph.trace import trace
from tests.model.graph.block_builders import SIZE


def changes_of(forward: nn.Module) -> list[fx.Node]:
    return [node for node in trace(forward.eval(), SIZE).graph.nodes if is_layout(node)]


class Moves(nn.Module):
    """Reshapes (tuples) and permutations (lists) of images."""

    def __init__(self, moves: list[tuple[int, ...] | list[int]]) -> None:
        super().__init__()
        self.moves, self.gain = moves, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gain
        for move in self.moves:
            x = x.permute(move) if isinstance(move, list) else x.reshape(-1, *move)
        return x


@st.composite
def moves(draw: st.DrawFn) -> list[tuple[int, ...] | list[int]]:
    """Draw moves that keep the batch first, often followed by their inverses."""
    shape, done = SIZE, list[tuple[int, ...] | list[int]]()
    back: list[tuple[int, ...] | list[int]] = []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            order = draw(st.permutations(range(1, len(shape) + 1)))
            done.append([0, *order])
            back.insert(0, [0, *(1 + np.argsort(order)).tolist()])
            shape = tuple(shape[dim - 1] for dim in order)
        else:
            back.insert(0, shape)
            shape = draw(
                st.sampled_from([(math.prod(shape),), (3, 64), (8, 24), (8, 8, 3), (64, 3), (2, 96)])
            )
            done.append(shape)
    return done + (back if draw(st.integers(0, 3)) else back[:-1])


@settings(max_examples=30, deadline=None)
@given(moves())
def test_moves_that_cancel_leave_every_element_in_its_place(moves: list[tuple[int, ...] | list[int]]) -> None:
    array = np.arange(2 * math.prod(SIZE)).reshape(2, *SIZE)
    for move in moves:
        array = array.transpose(move) if isinstance(move, list) else array.reshape(2, *move)
    same = array.shape == (2, *SIZE) and bool((array.ravel() == np.arange(array.size)).all())
    if layouts_cancel(changes_of(Moves(moves))):
        assert same
    elif all(isinstance(move, list) for move in moves) or all(isinstance(move, tuple) for move in moves):
        assert not same


@pytest.mark.parametrize(
    ("moves", "cancels"),
    [
        ([(3, 64), (3, 8, 8)], True),
        ([(3, 64), [0, 2, 1], [0, 2, 1], (3, 8, 8)], True),
        ([(3, 64), [0, 2, 1], (8, 8, 3), (64, 3), [0, 2, 1], (3, 8, 8)], True),
        ([[0, 2, 3, 1], [0, 3, 1, 2]], True),
        ([[0, 2, 1, 3], [0, 1, 3, 2], [0, 3, 1, 2]], True),
        ([[0, 2, 1, 3], [0, 1, 3, 2], [0, 2, 3, 1]], False),
        ([[0, 2, 3, 1], [0, 2, 3, 1]], False),
        ([(3, 64), [0, 2, 1], (3, 8, 8)], False),
        ([(8, 8, 3), [0, 3, 1, 2]], False),
    ],
)
def test_known_moves(moves: list[tuple[int, ...] | list[int]], cancels: bool) -> None:
    assert layouts_cancel(changes_of(Moves(moves))) == cancels


class Named(nn.Module):
    """Moves by operators with other names."""

    def __init__(self, back: bool) -> None:
        super().__init__()
        self.back, self.gain = back, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = (x * self.gain).flatten(2).transpose(-1, -2).unsqueeze(1)
        x = x.squeeze(1).transpose(1, 2) if self.back else x.squeeze(1)
        return x.unflatten(2, (8, 8)) if self.back else x


@pytest.mark.parametrize("back", [True, False])
def test_operators_of_other_names(back: bool) -> None:
    changes = changes_of(Named(back))
    assert len(changes) == 4 + 2 * back
    assert layouts_cancel(changes) == back
