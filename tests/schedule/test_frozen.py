"""Choosing weights around frozen levels: theirs stay, and the levels above reach their sparsities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestify.recipe.level_options import Score
from nestify.recipe.levels import Level, Pattern, parse_pattern
from nestify.schedule.frozen import select_around_frozen
from nestify.schedule.weights import select_entry_levels

SHAPES = {"a": (16, 8, 3, 3), "b": (12, 16), "first": (8, 3, 3, 3)}


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (1 + k)
        for k, (name, shape) in enumerate(SHAPES.items())
    }


def all_available(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(weight, dtype=torch.uint8) for name, weight in weights.items()}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 95), min_size=3, max_size=5, unique=True),
    st.sampled_from(["lamp", "magnitude", "uniform", "erk"]),
    st.sampled_from(["unstructured", "4x1", "2x2"]),
    st.data(),
)
def test_frozen_weights_stay_and_higher_levels_reach_their_sparsity(
    percents: list[int], score: Score, pattern: str, data: st.DataObject
) -> None:
    block = parse_pattern(pattern)
    levels = [
        Level(f"l{percent}", percent / 100, block if percent else Pattern())
        for percent in sorted(percents, reverse=True)
    ]
    frozen = data.draw(st.integers(1, len(levels) - 1))
    old, new = random_weights(0), random_weights(1)
    before = select_entry_levels(old, levels, score).tensors
    chosen = select_around_frozen(new, levels, score, all_available(new), before, frozen)

    for name in SHAPES:
        was, now = before[name], chosen[name]
        assert torch.equal(was <= frozen, now <= frozen)
        assert torch.equal(was[was <= frozen], now[now <= frozen])
    size = sum(weight.numel() for weight in new.values())
    for k, level in enumerate(levels[frozen:], start=frozen + 1):
        kept = sum(int((chosen[name] <= k).sum()) for name in SHAPES)
        # Complete blocks reach the target of a layer to within half a block.
        tolerance = 0.5 if pattern == "unstructured" else len(SHAPES) * 2 + 0.5
        assert abs(kept - (1 - level.sparsity) * size) <= tolerance + 1e-6


def test_the_best_of_the_other_weights_are_added() -> None:
    weights = {"a": torch.tensor([[0.1, 9.0, 3.0, 5.0]])}
    entry = {"a": torch.tensor([[1, 3, 3, 3]], dtype=torch.uint8)}
    levels = [Level("core", 0.75), Level("middle", 0.5), Level("top", 0.25)]
    chosen = select_around_frozen(weights, levels, "magnitude", all_available(weights), entry, 1)
    assert chosen["a"].tolist() == [[1, 2, 4, 3]]


@pytest.mark.parametrize("frozen", [1, 2])
def test_n_of_m(frozen: int) -> None:
    levels = [Level("1:4", 0.75, parse_pattern("1:4")), Level("2:4", 0.5, parse_pattern("2:4"))]
    levels += [Level("3:4", 0.25, parse_pattern("3:4")), Level("dense", 0.0)]
    old, new = random_weights(0), random_weights(1)
    before = select_entry_levels(old, levels).tensors
    chosen = select_around_frozen(new, levels, "lamp", all_available(new), before, frozen)
    for name in ("a", "b"):
        assert torch.equal(chosen[name].clamp(max=frozen + 1), before[name].clamp(max=frozen + 1))
        groups = chosen[name].movedim(1, -1).unflatten(-1, (-1, 4))
        for level in range(1, 5):
            assert bool(((groups <= level).sum(-1) == level).all())
    assert torch.equal(chosen["first"], torch.ones_like(chosen["first"]))  # three channels do not divide by 4
