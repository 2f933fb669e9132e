"""Gates: whether the levels of a file keep the limits that were set for them. No torch here."""

from collections.abc import Callable, Sequence

from nestify.evaluate.gates import GateResult, State, missed
from nestify.report.sheet import Column, Sheet
from nestify.report.table import number

_SHOWN: dict[str, Callable[[float], str]] = {
    "min_top1": lambda value: f"{number(value)} %",
    "max_drop": lambda value: f"{number(value)} points",
    "max_regression": lambda value: f"{number(value)} points",
}


def gates_table(results: Sequence[GateResult]) -> Sheet:
    """Limits and what the levels have, one row each; a gate is called as in TOML."""

    def shown(result: GateResult, value: float | None) -> str:
        return "not known" if value is None else _SHOWN.get(result.gate, "{:,.0f}".format)(value)

    return Sheet(
        [
            Column("level", [str(result.level) for result in results], rank=1),
            Column("name", [result.name for result in results], is_text=True),
            Column("gate", [result.gate for result in results], is_text=True),
            Column("limit", [shown(result, result.limit) for result in results]),
            Column("value", [shown(result, result.value) for result in results]),
            Column("result", [_WORD[result.state] for result in results], is_text=True),
        ]
    )


_WORD: dict[State, str] = {"met": "ok", "missed": "MISSED", "not compared": "not compared"}


def in_words(results: Sequence[GateResult]) -> str:
    """Which gates were missed, as the subject of a sentence."""
    names = [f"{result.gate} of level {result.level} ({result.name})" for result in missed(results)]
    return ", ".join(names)
