"""JUnit XML, JSON lines and exit codes, against what other programs take."""

import json
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestify.compression.batch.results import JobResult, exit_code
from nestify.compression.batch.tables import write_jsonl, write_junit


def result(name: str, code: int | None = None, **facts: object) -> JobResult:
    state = "pending" if code is None else "done" if code == 0 else "failed"
    return JobResult.model_validate(
        {"name": name, "recipe": "a.toml", "state": state, "exit_code": code, "seconds": 1.5, **facts}
    )


JOBS = [
    result("a", 0),
    result("b", 0, earlier=True),
    result("c", 1, message="level 1 missed its budget"),
    result("d", 3, message="no images"),
    result("e"),
    result("f", 143, state="interrupted"),
]


def test_junit_counts_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    write_junit(path, "nestify batch", JOBS, {"c": ["one", "two"], "d": ["<&>"]}, 9.25)
    root = ElementTree.parse(path).getroot()
    assert root.tag == "testsuites"
    [suite] = root
    counts = {"tests": "6", "failures": "1", "errors": "2", "skipped": "1", "time": "9.250"}
    assert suite.tag == "testsuite"
    assert suite.attrib == {"name": "nestify batch", **counts}
    assert root.attrib == counts
    found = {case.get("name"): {part.tag: (part.attrib, part.text) for part in case} for case in suite}
    assert found == {
        "a": {},
        "b": {"system-out": ({}, "done by an earlier run, and skipped")},
        "c": {"failure": ({"message": "level 1 missed its budget", "type": "exit code 1"}, "one\ntwo")},
        "d": {"error": ({"message": "no images", "type": "exit code 3"}, "<&>")},
        "e": {"skipped": ({"message": "not begun"}, None)},
        "f": {"error": ({"message": "", "type": "exit code 143"}, None)},
    }
    assert {(case.tag, case.get("classname")) for case in suite} == {("testcase", "a.toml")}
    assert [case.get("time") for case in suite] == ["1.500", "0.000", "1.500", "1.500", "1.500", "1.500"]


@given(st.text(max_size=50), st.lists(st.text(max_size=50), max_size=3))
@settings(max_examples=200, deadline=None)
def test_junit_holds_any_text(text: str, log: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "junit.xml")
        write_junit(path, text, [result(text, 3, message=text)], {text: log}, 0)
        [[case]] = ElementTree.parse(path).getroot()
        shown = "".join(c for c in text if c in "\t\n\r" or (c >= " " and c not in "\ufffe\uffff"))
        assert case[0].get("message") == shown
        assert case.get("name") == shown


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_jsonl(path, JOBS)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["name"] for line in lines] == list("abcdef")
    assert {line["schema_version"] for line in lines} == {1}
    assert [JobResult.model_validate(line) for line in lines] == JOBS


@pytest.mark.parametrize(
    ("codes", "signal", "expected"),
    [
        ([], None, 0),
        ([0, None, 0], None, 0),
        ([0, 1], None, 1),
        ([1, 2, 1], None, 2),
        ([2, 3, 1], None, 3),
        ([3, 4, 2], None, 4),
        ([4, 70, 3], None, 70),
        ([1, 137], None, 3),
        ([143, 2], None, 3),
        ([5], None, 3),
        ([70, 0], 2, 130),
        ([0], 15, 143),
        ([0], 10, 143),
    ],
)
def test_exit_codes(codes: list[int | None], signal: int | None, expected: int) -> None:
    assert exit_code([result("a", code) for code in codes], signal) == expected
