"""`nestify verify`: check that a nested file contains what its manifest describes."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nestify.cli.arguments import AsJson, NestedFileOrAddress

if TYPE_CHECKING:
    from nestify.evaluation.verify import Verification

SCHEMA_VERSION = 1


def verify(
    file: NestedFileOrAddress,
    as_json: AsJson = False,
) -> None:
    """Check hashes, weight counts, nesting and logits of every level.

    Each level is rebuilt from its own prefix alone, as on a device. Exit with 3 if a level fails a check.
    """
    from nestify.cli.output import json_text, write_result
    from nestify.errors import BadFileError
    from nestify.evaluation.verify import verify as run
    from nestify.report.table import verification_notes, verification_table
    from nestify.report.text import render

    done = run(file)
    bad = [level for level in done.levels if level.problem is not None]
    if as_json:
        write_result(json_text(_document(done)), None)
    else:
        text = render(done.name, [verification_table(done)], verification_notes(done), sys.stdout)
        write_result(text, None)
    if bad:
        names = ", ".join(f"{level.level} ({level.name})" for level in bad)
        raise BadFileError(
            f"{done.name}: levels that failed verification: {names}; get an intact copy or write it again"
        )


def _document(done: "Verification") -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "file": done.name,
        "passed": done.passed,
        "levels": [asdict(level) for level in done.levels],
    }
