"""Pick the level of a nested file to run: the best one that meets limits on cost and accuracy."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from nestify.errors import BadFileError, GateFailed, RecipeError
from nestify.file.measurements import Measurement
from nestify.file.summary import LevelReport, Report, read_report
from nestify.recipe.amounts import Limited, show_amount
from nestify.shown import Shown

Values = Mapping[Limited, float | None]


@dataclass(frozen=True)
class Limit:
    """A limit of a level: the most that it may cost, or the least top-1 that it must reach.

    Attributes:
        limited: `latency` (seconds for one batch), `bytes` (of the file up to and with the level), `macs`
            (that dense kernels execute for one image), `params` (parameters that are not masked out)
            or `top1` (percent).
        bound: the limit, above 0; the bound itself is allowed.
    """

    limited: Limited
    bound: float

    @property
    def option(self) -> str:
        """The name on the command line."""
        return option(self.limited)

    def meets(self, value: float | None) -> bool:
        """Whether a level with this value is allowed; an unknown value is not."""
        return self.over(value) <= 0

    def over(self, value: float | None) -> float:
        """Return how far a value is beyond the limit; infinite if it is not known."""
        if value is None:
            return math.inf
        return self.bound - value if self.limited == "top1" else value - self.bound

    def __str__(self) -> str:
        return f"{self.option} {show_amount(self.limited, self.bound)}"


@dataclass(frozen=True)
class Candidate:
    """One level, compared with the limits.

    Attributes:
        level: the level.
        values: its known values, by what can be limited.
        missed: limits that it does not meet.
    """

    level: int
    name: str
    values: Values
    missed: Sequence[Limit]


@dataclass(frozen=True, repr=False)
class Pick(Shown):
    """The level that was picked, and all candidates.

    Attributes:
        path: the file.
        limits: the limits.
        level: the best level that meets all limits; None if none does.
        candidates: all levels, core first.
        measurement: measurement that the latencies are from; None if there are none.
    """

    path: str
    limits: Sequence[Limit]
    level: Candidate | None
    candidates: Sequence[Candidate]
    measurement: Measurement | None = None

    def check(self) -> Candidate:
        """Return the level that was picked.

        Raises:
            GateFailed: if there is none; the message names the limits that no level meets.
        """
        if self.level is None:
            raise GateFailed(f"{self.path}: {_why_none(self.candidates, self.limits)}")
        return self.level


def option(limited: Limited) -> str:
    """Return the command line's name of a limit."""
    return "--min-top1" if limited == "top1" else f"--max-{limited}"


def choose(report: Report, limits: Sequence[Limit], latencies: Mapping[int, float] | None = None) -> Pick:
    """Pick the best level that meets all limits.

    The best is the one with the highest score (top-1, or what the levels are judged by), and the lowest of
    several. If levels of the file predict different classes, or some were not evaluated, they cannot be
    compared, and the best is the highest one.

    Args:
        report: report of the file.
        limits: the limits.
        latencies: seconds for one batch, by level; needed for a limit on latency.

    Raises:
        RecipeError: if there is no limit, or one that is not above 0 and finite.
        BadFileError: if the file has the limited value for no level.
    """
    _check(limits)
    candidates = [_held(level, limits, latencies or {}) for level in report.levels]
    for limit in limits:
        if all(candidate.values[limit.limited] is None for candidate in candidates):
            raise BadFileError(f"{report.path}: {_unknown(limit)}")
    key = _order(report)
    allowed = [candidate for candidate in candidates if not candidate.missed]
    return Pick(report.path, limits, max(allowed, key=key, default=None), candidates)


def pick(
    path: str | os.PathLike[str],
    limits: Sequence[Limit],
    *,
    batch_size: int = 1,
    threads: int | None = None,
    device: str = "auto",
    saved: bool = False,
    engine: bool = False,
    int8: bool = False,
) -> Pick:
    """Pick the best level of a file that meets all limits on this machine; see `choose`.

    Only a limit on latency needs a measurement, and torch.

    Args:
        path: the nested file, or its address.
        limits: the limits.
        batch_size: images per call, for the latency.
        threads: number of torch's CPU threads; None for the current number.
        device: device to measure on, as for `bench`.
        saved: whether to use the latency that `bench` saved on this machine, without measuring.
        engine: whether the latency is that of the sparse engine, in place of torch.
        int8: with `engine`, whether the latency is that of int8; the top-1 stays the one of float32.

    Raises:
        NestifyError: see `choose` and `bench`; also if no such measurement was saved, or if options of a
            measurement are given without a limit on latency.
    """
    _check(limits)
    if not any(limit.limited == "latency" for limit in limits):
        given = {
            "--batch-size": batch_size != 1,
            "--threads": threads is not None,
            "--device": device != "auto",
            "--saved": saved,
            "--engine": engine,
            "--int8": int8,
        }
        if unused := [name for name, is_given in given.items() if is_given]:
            raise RecipeError(
                f"{', '.join(unused)}: only a limit on latency needs a measurement; add --max-latency, or "
                "leave the rest out"
            )
        return choose(read_report(path), limits)
    report = read_report(path)
    from nestify.evaluation import bench as benching

    counts = None if threads is None else (threads,)
    if saved:
        measurement = benching.saved_measurement(report, batch_size, counts, device, engine, int8)
    else:
        [measurement] = benching.bench(
            path, batch_sizes=(batch_size,), threads=counts, device=device, engine=engine, int8=int8
        ).measurements
    latencies = {level.level: level.median_seconds for level in measurement.levels}
    return replace(choose(report, limits, latencies), measurement=measurement)


def _check(limits: Sequence[Limit]) -> None:
    if not limits:
        raise RecipeError(
            "no limit is given; give one or more of --max-latency, --max-bytes, --max-macs, --max-params, "
            "--min-top1"
        )
    for limit in limits:
        if limit.limited not in get_args(Limited):
            known = ", ".join(get_args(Limited))
            raise RecipeError(f"there is no limit on {limit.limited!r}; limit one or more of {known}")
        if not 0 < limit.bound < math.inf:
            raise RecipeError(f"{limit.option} {limit.bound:g} is not above 0 and finite")
        if limit.limited == "top1" and limit.bound > 100:
            raise RecipeError(f"{limit.option} {limit.bound:g} is above 100 percent")


def _held(level: LevelReport, limits: Sequence[Limit], latencies: Mapping[int, float]) -> Candidate:
    values: Values = {"latency": latencies.get(level.level), **level.limited}
    missed = [limit for limit in limits if not limit.meets(values[limit.limited])]
    return Candidate(level.level, level.name, values, missed)


def _order(report: Report) -> Callable[[Candidate], tuple[float, int]]:
    """Return a sort key for all levels of a file, so that a tighter limit never gives a better level."""
    alike = len({level.class_set for level in report.levels}) == 1
    scores = {level.level: level.score for level in report.levels}
    if alike and None not in scores.values():
        return lambda candidate: (scores[candidate.level] or 0.0, -candidate.level)
    return lambda candidate: (0.0, candidate.level)


def _unknown(limit: Limit) -> str:
    if limit.limited == "top1":
        return (
            f"holds no top-1, which {limit} needs; compress it with validation images, or leave the limit out"
        )
    return f"does not say what {limit} limits; leave the limit out"


def _why_none(candidates: Sequence[Candidate], limits: Sequence[Limit]) -> str:
    never = [limit for limit in limits if all(limit in candidate.missed for candidate in candidates)]
    if never:
        told = " and ".join(f"{limit} ({_nearest(candidates, limit)})" for limit in never)
        return f"no level meets {told}; loosen the limit{'s' * (len(never) > 1)}"
    misses = ", ".join(
        f"{candidate.name} misses {' and '.join(map(str, candidate.missed))}" for candidate in candidates
    )
    return f"each limit is met by some level, but no level meets all: {misses}; loosen one"


def _nearest(candidates: Sequence[Candidate], limit: Limit) -> str:
    nearest = min(candidates, key=lambda candidate: limit.over(candidate.values[limit.limited]))
    value = nearest.values[limit.limited]
    assert value is not None, "of some level it is known, or there was no pick"
    return f"{nearest.name} comes nearest with {show_amount(limit.limited, value)}"
