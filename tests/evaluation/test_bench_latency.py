"""Measuring in turns: a clock that moves only as the calls say, statistics by NumPy."""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestify.evaluation.bench import LEAST_ROUNDS, MOST_ROUNDS, Effort, measure


class FakeClock:
    """Seconds that pass only while something is called."""

    def __init__(self) -> None:
        self.now = 100.0
        self.order: list[int] = []

    def __call__(self) -> float:
        return self.now

    def call(self, level: int, seconds: Sequence[float]) -> Callable[[], None]:
        """Something that takes these seconds, over and over."""
        durations: Iterator[float] = cycle(seconds)

        def run() -> None:
            self.order.append(level)
            self.now += next(durations)

        return run


# Powers of two: their sums and differences are exact in binary.
DURATIONS = st.lists(st.integers(1, 2**20).map(lambda n: n / 2**10), min_size=12, max_size=12)


@given(st.dictionaries(st.integers(1, 4), DURATIONS, min_size=1), st.integers(2, 10))
def test_statistics_are_numpys(seconds: dict[int, list[float]], rounds: int) -> None:
    clock = FakeClock()
    calls = {level: clock.call(level, own) for level, own in seconds.items()}
    reference = max(seconds)
    found = measure(calls, reference, Effort(warmup=0, rounds=rounds), clock)
    counted = {level: np.array(own[2 : 2 + rounds]) for level, own in seconds.items()}  # after two rounds
    for level, latency in found.items():
        ratios = counted[level] / counted[reference]
        assert latency.rounds == rounds
        assert latency.median == pytest.approx(np.median(counted[level]))
        assert latency.p95 == pytest.approx(np.percentile(counted[level], 95))
        assert latency.ratio == pytest.approx(np.median(ratios))
        assert latency.quartiles == pytest.approx(tuple(np.percentile(ratios, [25, 75])))
    assert found[reference].ratio == 1
    assert found[reference].quartiles == (1, 1)


def test_the_ratio_is_within_the_rounds() -> None:
    """A machine that becomes ten times slower for half of the rounds moves medians, and no ratio."""
    clock = FakeClock()
    pace = [1.0] * 5 + [10.0] * 6
    calls = {
        1: clock.call(1, [1, 1, *(0.25 * p for p in pace)]),
        2: clock.call(2, [1, 1, *pace]),
    }
    found = measure(calls, 2, Effort(warmup=0, rounds=11), clock)
    assert found[1].median == 2.5
    assert (found[1].ratio, found[1].quartiles) == (0.25, (0.25, 0.25))


def test_calls_take_turns_and_every_other_round_runs_backwards() -> None:
    clock = FakeClock()
    measure({k: clock.call(k, [1]) for k in (1, 2, 3)}, 3, Effort(warmup=0, rounds=3), clock)
    assert clock.order == [1, 2, 3, 3, 2, 1, 1, 2, 3, 3, 2, 1, 1, 2, 3]  # the first two warm up


@pytest.mark.parametrize(
    ("seconds", "each", "rounds"),
    [(3, 0.25, 12), (3, 10, LEAST_ROUNDS), (0, 1, LEAST_ROUNDS), (1e9, 1, MOST_ROUNDS)],
)
def test_rounds_fill_the_seconds(seconds: float, each: float, rounds: int) -> None:
    clock = FakeClock()
    assert measure({1: clock.call(1, [each])}, 1, Effort(0, seconds), clock)[1].rounds == rounds


def test_the_warm_up_does_not_count() -> None:
    clock = FakeClock()
    slow_start = clock.call(1, [8.0] * 4 + [1.0] * 100)
    found = measure({1: slow_start}, 1, Effort(warmup=32, rounds=50), clock)[1]
    assert (found.median, found.p95) == (1, 1)
    assert len(clock.order) == 4 + 50
