"""How gates show themselves: a table, a part of a JSON document, and the exit code."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nestify.errors import GateFailed
from nestify.evaluate.gates import GateResult, missed
from nestify.report.gates import gates_table, in_words
from nestify.report.sheet import Sheet


def gates_sheets(results: Sequence[GateResult]) -> list[Sheet]:
    """The table of all gates; none where there are none."""
    return [gates_table(results)] if results else []


def gates_document(results: Sequence[GateResult]) -> dict[str, Any]:
    """What a JSON document says of gates."""
    return {"gates": [asdict(result) for result in results], "passed": not missed(results)}


def refuse_missed(path: str, results: Sequence[GateResult]) -> None:
    """Make missed gates the command's exit code.

    Raises:
        GateFailed: if there are any.
    """
    if failed := missed(results):
        were = "were" if len(failed) > 1 else "was"
        raise GateFailed(f"{path}: {in_words(results)} {were} missed; the table of gates says by how much")
