"""Gates: limits that the levels of a nested file must meet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nestify.errors import RecipeError
from nestify.file.summary import LevelReport, Report, open_report
from nestify.recipe.amounts import Quantity, parse_amount
from nestify.recipe.gates import Gates, LevelGates
from nestify.recipe.metric import METRICS, metric_of

AMOUNTS: tuple[Quantity, ...] = ("bytes", "macs", "params")


State = Literal["met", "missed", "not compared"]


@dataclass(frozen=True)
class GateResult:
    """One limit of one level.

    Attributes:
        level: number of the level.
        name: name of the level.
        gate: `min_top1`, `max_drop`, ...
        limit: the limit, in percent, points, bytes, MACs or parameters.
        value: the level's value; None if it was not measured, or the baseline does not have it.
        state: `missed` also if the value is not known; `not compared` for a `max_drop` of all levels at a
            level that predicts other classes than the full level.
    """

    level: int
    name: str
    gate: str
    limit: float
    value: float | None
    state: State


def check_gates(gates: Gates, report: Report, baseline: Report | None = None) -> list[GateResult]:
    """Check every level against its limits.

    Args:
        gates: the limits.
        report: report of the file.
        baseline: report for `max_regression`; None for the one that the gates name.

    Returns:
        One result for each limit of each level, core first.

    Raises:
        RecipeError: if there are limits for levels that the report does not have.
        BadFileError: if the baseline cannot be read.
    """
    names = [level.name for level in report.levels]
    if unknown := gates.unknown_levels(names):
        raise RecipeError(
            f"gates.level.{unknown[0]}: {report.path} has no such level; its levels are {', '.join(names)}"
        )
    if baseline is None and gates.baseline is not None:
        baseline = open_report(gates.baseline)
    return [
        result
        for level in report.levels
        for result in _results(
            gates, gates.for_level(level.level, level.name), level, report.levels[-1], baseline
        )
    ]


def missed(results: Sequence[GateResult]) -> list[GateResult]:
    """Return the limits that are missed."""
    return [result for result in results if result.state == "missed"]


def _results(
    gates: Gates, limits: LevelGates, level: LevelReport, full: LevelReport, baseline: Report | None
) -> Iterator[GateResult]:
    def result(gate: str, limit: float, value: float | None, is_met: bool) -> GateResult:
        met = value is not None and is_met
        return GateResult(level.level, level.name, gate, limit, value, "met" if met else "missed")

    for metric in METRICS:
        least = getattr(limits, metric.gate)
        if least is not None:
            score = metric.score(level)
            yield result(metric.gate, least, score, score is not None and score >= least)
    if limits.max_drop is not None and level is not full:
        drop = _below(full, level)
        if level.class_set != full.class_set and not _is_own(gates, level):
            yield GateResult(level.level, level.name, "max_drop", limits.max_drop, None, "not compared")
        else:
            yield result("max_drop", limits.max_drop, drop, _at_most(drop, limits.max_drop))
    if limits.max_regression is not None:
        drop = _below(_same(level, baseline), level)
        yield result("max_regression", limits.max_regression, drop, _at_most(drop, limits.max_regression))
    for kind in AMOUNTS:
        given = getattr(limits, f"max_{kind}")
        if given is not None:
            limit, value = parse_amount(kind, str(given)), level.limited[kind]
            yield result(f"max_{kind}", limit, value, _at_most(value, limit))


def _is_own(gates: Gates, level: LevelReport) -> bool:
    """Whether the drop was set for this level only."""
    own = [gates.level[key] for key in (str(level.level), level.name) if key in gates.level]
    return any(each.max_drop is not None for each in own)


def _same(level: LevelReport, baseline: Report | None) -> LevelReport | None:
    """Return the level of this name in a baseline, if it predicts the same classes."""
    levels = [] if baseline is None else baseline.levels
    same = next((other for other in levels if other.name == level.name), None)
    fits = same is not None and (same.classes, same.class_set) == (level.classes, level.class_set)
    return same if fits else None


def _below(other: LevelReport | None, level: LevelReport) -> float | None:
    """Return the points by which a level is below another; negative if it is above.

    None if they are not both measured with labels, by the same metric.
    """
    metric = metric_of(level)
    if other is None or metric.is_comparison or metric_of(other) is not metric:
        return None
    here, there = metric.score(level), metric.score(other)
    if here is None or there is None:
        return None
    return round(there - here, 6)  # 1.3 - 1 is more than 0.3


def _at_most(value: float | None, limit: float) -> bool:
    return value is not None and value <= limit
