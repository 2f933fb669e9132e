"""The gradual schedule: sparsity rises along a cubic from 0 to the target, and stays there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestify.recipe.levels import Level, Pattern, check_levels
from nestify.schedule.ramp import Ramp

LEVELS = [Level("a", 0.95), Level("b", 0.8), Level("c", 0.0)]


def test_sparsity_follows_the_cubic_from_zero_to_the_target() -> None:
    ramp = Ramp(LEVELS, steps=100, selections=10)
    assert [level.sparsity for level in ramp.levels_at(0)] == [0, 0, 0]
    assert ramp.levels_at(50)[0].sparsity == pytest.approx(0.95 * (1 - 0.5**3))
    assert ramp.levels_at(100) == LEVELS
    assert ramp.levels_at(5000) == LEVELS


def test_weights_are_chosen_at_even_steps_and_once_at_the_end() -> None:
    ramp = Ramp(LEVELS, steps=10, selections=5)
    assert [step for step in range(30) if ramp.is_due(step)] == [0, 2, 4, 6, 8, 10]
    assert [step for step in range(5) if Ramp(LEVELS, 0, 5).is_due(step)] == [0]


@given(st.integers(0, 200), st.integers(1, 200))
def test_n_of_m_levels_keep_whole_numbers_and_stay_nested(step: int, steps: int) -> None:
    levels = [
        Level("a", 0.75, Pattern("n:m", n=1, m=4)),
        Level("b", 0.5, Pattern("n:m", n=2, m=4)),
        Level("c", 0.0),
    ]
    now = Ramp(levels, steps, 10).levels_at(step)
    kept = [level.pattern.n if level.pattern.kind == "n:m" else 4 for level in now]
    assert kept == sorted(kept)
    assert all(level.sparsity == 1 - n / 4 for level, n in zip(now, kept, strict=True))
    if step >= steps:
        assert kept == [1, 2, 4]
        assert check_levels(now) == []
