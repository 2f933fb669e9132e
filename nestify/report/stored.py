"""Reports that were stored as JSON, read again. No torch here."""

import os
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nestify.errors import BadFileError
from nestify.nested_file.strict_json import strict_json
from nestify.report.document import SCHEMA_VERSION, Report, read_report

MAX_BYTES = 2**26


def open_report(path: str | os.PathLike[str]) -> Report:
    """The report of a nested file, or one that `report --json` printed of it, by the ending `.json`.

    Raises:
        BadFileError: if it is neither, or a damaged one.
    """
    if not os.fspath(path).endswith(".json"):
        return read_report(path)
    document = _read(Path(path))
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise BadFileError(
            f"{path}: this is no report of schema version {SCHEMA_VERSION}; write one with "
            "nestify report FILE --json"
        )
    levels = [{"layers": [], **level} for level in _tables(document.get("levels"))]
    place = "levels"
    try:
        report = TypeAdapter(Report).validate_python({**document, "levels": levels})
        if report.levels:
            return report
    except ValidationError as error:
        place = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
    raise BadFileError(
        f"{path}: {place} is not what a report has there; write it with nestify report FILE --json"
    )


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadFileError(f"{path}: this is larger than any report ({MAX_BYTES >> 20} MiB)")
        return strict_json(path.read_bytes().decode())
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise BadFileError(
            f"{path}: this is not JSON; give a nested file, or what nestify report --json printed"
        ) from error


def _tables(levels: object) -> list[dict[str, Any]]:
    rows = levels if isinstance(levels, list) else []
    return [row if isinstance(row, dict) else {} for row in rows]
