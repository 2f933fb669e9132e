"""Stored reports are read unchanged, or refused with one sentence."""

import json
from pathlib import Path

import pytest

from nestify.errors import BadFileError
from nestify.file.summary import open_report
from tests.report.report_builders import layer, report


def test_a_stored_report_is_the_report(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    full = report({"layers": [layer("fc", 10)]}, {"top1": None, "layers": [layer("fc", 100)]})
    path.write_text(json.dumps(full.to_dict(layers=True)))
    assert open_report(path).to_dict(layers=True) == full.to_dict(layers=True)
    path.write_text(json.dumps({**report({}).to_dict(), "gates": [], "passed": True}))
    assert open_report(path).to_dict() == report({}).to_dict()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "this is not JSON"),
        ("[" * 100_000, "this is not JSON"),
        ("[]", "not a report of schema version 1"),
        ('{"schema_version": 2}', "not a report of schema version 1"),
        ('{"schema_version": 1, "schema_version": 1}', "this is not JSON"),
        ('{"schema_version": 1}', "is not valid in a report"),
        ('{"schema_version": 1, "levels": [3]}', "is not valid in a report"),
    ],
)
def test_other_files_are_refused(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(BadFileError, match=problem) as error:
        open_report(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["path", "levels", "architecture"])
def test_a_report_without_a_key_is_refused(key: str, tmp_path: Path) -> None:
    document = report({}).to_dict()
    del document[key]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    with pytest.raises(BadFileError, match=f"{key} is not"):
        open_report(path)


@pytest.mark.parametrize("key", ["path", "architecture", "name", "class_set"])
def test_control_characters_are_refused(key: str, tmp_path: Path) -> None:
    document = report({}).to_dict()
    place = document if key in document else document["levels"][0]
    place[key] = "core\x1b[31m"
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    with pytest.raises(BadFileError, match=f"{key} is not"):
        open_report(path)
