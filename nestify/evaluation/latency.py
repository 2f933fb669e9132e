"""How long calls take, in turns: pure measuring, of anything that can be called. No torch here.

`torch.utils.benchmark` is not used because its `Timer` keeps the mean of a block of calls and runs one
statement after the other. A 95th percentile needs the single calls, and a ratio that a busy machine does not
move needs both sides within the same moment.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LEAST_ROUNDS = 10
"""However long they take, where no number was asked for."""

MOST_ROUNDS = 10_000

LEAST_WARM_UP = 2

Clock = Callable[[], float]
Times = Mapping[int, float]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        warmup: seconds of rounds that do not count; at least two rounds.
        seconds: of rounds that count; from 10 to 10,000 rounds.
        rounds: exactly so many instead, at least two; None: as many as fit into `seconds`.
    """

    warmup: float = 0.5
    seconds: float = 3.0
    rounds: int | None = None


@dataclass(frozen=True)
class Latency:
    """How long one call takes.

    Attributes:
        median, p95: seconds; p95 is the 95th percentile.
        ratio: median over the rounds of its seconds over those of the reference in the same round.
        quartiles: the first and the third quartile of the same ratios.
        rounds: how often it was called.
    """

    median: float
    p95: float
    ratio: float
    quartiles: tuple[float, float]
    rounds: int


def measure(
    calls: Mapping[int, Callable[[], object]], reference: int, effort: Effort, clock: Clock
) -> dict[int, Latency]:
    """Measure calls in turns, so that whatever else the machine does hurts all alike.

    Args:
        calls: by level.
        reference: the level that the others are compared with.
        clock: seconds since any moment; where a call only starts work, it waits for its end.
    """
    _rounds(calls, clock, effort.warmup, LEAST_WARM_UP, MOST_ROUNDS)
    least, most = (LEAST_ROUNDS, MOST_ROUNDS) if effort.rounds is None else (effort.rounds, effort.rounds)
    rounds = _rounds(calls, clock, effort.seconds, least, most)
    return {level: _latency(rounds, level, reference) for level in calls}


def _rounds(
    calls: Mapping[int, Callable[[], object]], clock: Clock, seconds: float, least: int, most: int
) -> list[Times]:
    """Rounds until the seconds are over. Every other one runs backwards, so that no order is favoured."""
    start = clock()
    rounds: list[Times] = []
    while len(rounds) < least or (len(rounds) < most and clock() - start < seconds):
        order = list(calls)[:: -1 if len(rounds) % 2 else 1]
        rounds.append({level: _seconds(calls[level], clock) for level in order})
    return rounds


def _seconds(call: Callable[[], object], clock: Clock) -> float:
    start = clock()
    call()
    return clock() - start


def _latency(rounds: Sequence[Times], level: int, reference: int) -> Latency:
    times = [times[level] for times in rounds]
    ratios = [times[level] / times[reference] for times in rounds]
    first, ratio, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return Latency(
        median=statistics.median(times),
        p95=statistics.quantiles(times, n=20, method="inclusive")[-1],
        ratio=ratio,
        quartiles=(first, third),
        rounds=len(rounds),
    )
