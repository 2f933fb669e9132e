"""Rankings of blocks: levels nest for any ranking, and keep about the same share of each stage."""

import math
from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestify.model.graph.blocks import Block, Stage
from nestify.recipe.levels import Level
from nestify.schedule.blocks import kept_blocks, rank_by_loss, rank_evenly
from nestify.schedule.nest import LevelSize, without_shrinking


def stages_of(sizes: Sequence[int]) -> list[Stage]:
    return [
        Stage((k,), tuple(Block(f"stages.{k}.{i}", (k,), (), 1, True) for i in range(size)))
        for k, size in enumerate(sizes)
    ]


sizes = st.lists(st.integers(1, 24), min_size=1, max_size=5)


@given(sizes, st.floats(0.01, 1))
def test_a_depth_keeps_its_share_of_the_blocks_and_of_every_stage(sizes: list[int], depth: float) -> None:
    stages = stages_of(sizes)
    ranking = rank_evenly(stages)
    assert sorted(ranking, key=lambda b: b.name) == sorted(
        (block for stage in stages for block in stage.blocks), key=lambda b: b.name
    )
    kept = kept_blocks(ranking, depth)
    assert len(kept) == max(1, math.ceil(depth * sum(sizes) - 1e-9))
    shares = [len(kept.intersection(stage.blocks)) / len(stage.blocks) for stage in stages]
    for (size, share), (other_size, other) in combinations(zip(sizes, shares, strict=True), 2):
        assert abs(share - other) <= 1 / size + 1 / other_size


@given(sizes, st.lists(st.floats(0.01, 1), min_size=2, max_size=4))
def test_levels_nest(sizes: list[int], depths: list[float]) -> None:
    ranking = rank_evenly(stages_of(sizes))
    kept = [kept_blocks(ranking, depth) for depth in sorted(depths)]
    assert all(lower <= higher for lower, higher in pairwise(kept))
    assert kept_blocks(ranking, 1) == set(ranking)


@pytest.mark.parametrize(
    ("n", "kept", "positions"),
    [
        (7, 1, {3}),
        (7, 3, {1, 3, 5}),
        (3, 2, {0, 1}),
        (4, 2, {1, 3}),
        (5, 3, {0, 2, 4}),
        (6, 3, {0, 2, 4}),
        (1, 1, {0}),
    ],
)
def test_the_kept_blocks_of_a_stage_are_spread_over_it(n: int, kept: int, positions: set[int]) -> None:
    (stage,) = stages_of([n])
    assert {stage.blocks.index(block) for block in kept_blocks(rank_evenly([stage]), kept / n)} == positions


def test_a_ranking_begins_with_one_block_of_every_stage() -> None:
    ranking = rank_evenly(stages_of([2, 3, 1]))
    assert {block.shape for block in ranking[:3]} == {(0,), (1,), (2,)}


def test_exact_depths_are_not_rounded_up() -> None:
    ranking = rank_evenly(stages_of([25]))
    assert [len(kept_blocks(ranking, k / 25)) for k in range(1, 26)] == list(range(1, 26))


def test_blocks_are_ranked_by_their_loss() -> None:
    (stage,) = stages_of([7])
    cost = {block: (3 * k) % 7 for k, block in enumerate(stage.blocks)}
    calls: list[int] = []

    def loss(skipped: Sequence[Block]) -> float:
        calls.append(len(skipped))
        return sum(cost[block] for block in skipped)

    ranking = rank_by_loss(stage.blocks, loss)
    assert [cost[block] for block in ranking] == [6, 5, 4, 3, 2, 1, 0]
    assert calls == [1] * 7


def test_levels_have_the_channels_and_blocks_of_the_levels_below() -> None:
    """Also where counts are rounded, or blocks are ranked in another order than for the levels below."""
    level = Level("one", 0.0)
    given = (((4, 8), "ab"), ((6, 6), "ac"), ((8, 8), ""))
    raised = without_shrinking([LevelSize(level, counts, frozenset(names)) for counts, names in given])
    assert [size.counts for size in raised] == [(4, 8), (6, 8), (8, 8)]
    assert [size.skipped for size in raised] == [{"a", "b"}, {"a"}, set()]
