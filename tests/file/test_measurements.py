"""Measurements next to a nested file: how they are saved, replaced, and refused if they are damaged."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestify.errors import BadFileError, OutputError
from nestify.file.measurements import (
    MAX_BYTES,
    MAX_MEASUREMENTS,
    LevelLatency,
    Machine,
    Measurement,
    check_savable,
    read_measured,
    save_measured,
)
from nestify.file.reader import NestedFile, open_nested_file
from nestify.file.summary import read_report
from nestify.file.writer import write_nested_file
from tests.file.builders import description, small_state

HERE = Machine(cpu="A CPU", cores=2, device="cpu", device_name="A CPU", system="Linux x86_64", torch="2.6")
THERE = HERE.model_copy(update={"cpu": "Another"})


def measurement(machine: Machine = HERE, **changes: Any) -> Measurement:
    """Return a measurement of three levels; the core level takes `milliseconds`."""
    seconds = changes.pop("milliseconds", 1.0) / 1000
    levels = [
        LevelLatency(
            level=k,
            name=f"size-{k}",
            median_seconds=seconds * k,
            p95_seconds=2 * seconds * k,
            over_full=k / 3,
            over_full_quartiles=(k / 4, k / 2),
        )
        for k in (1, 2, 3)
    ]
    facts = {"threads": 1, "batch_size": 1, "dtype": "float32", "rounds": 10, "date": "2026-01-31T12:00:00Z"}
    return Measurement(machine=machine, levels=levels, **{**facts, **changes})


@pytest.fixture
def file(tmp_path: Path) -> NestedFile:
    path = tmp_path / "small.nested.safetensors"
    write_nested_file(path, small_state(), description(3))
    return open_nested_file(path)


def sidecar(file: NestedFile) -> Path:
    return file.path.with_name("small.bench.json")


def test_saved_measurements_are_read(file: NestedFile) -> None:
    before = file.path.read_bytes()
    assert read_measured(file).measurements == ()
    assert save_measured(file, [measurement()]) == sidecar(file)
    found = read_measured(file)
    assert (list(found.measurements), found.problem) == ([measurement()], "")
    assert list(read_report(file.path).measured) == [measurement()]
    assert file.path.read_bytes() == before
    document = json.loads(sidecar(file).read_text())
    assert document["schema_version"] == 1
    header = before[: 8 + int.from_bytes(before[:8], "little")]
    assert document["header_sha256"] == hashlib.sha256(header).hexdigest()
    assert sorted(path.name for path in file.path.parent.iterdir()) == [
        "small.bench.json",
        "small.nested.safetensors",
    ]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(
            st.builds(
                measurement,
                machine=st.sampled_from([HERE, THERE]),
                threads=st.sampled_from([1, 2]),
                batch_size=st.sampled_from([1, 16]),
                dtype=st.sampled_from(["float32", "bfloat16"]),
                milliseconds=st.integers(1, 1000),
            ),
            min_size=1,
            max_size=3,
            unique_by=lambda m: m.conditions,
        ),
        max_size=4,
    )
)
def test_the_newest_measurement_for_equal_conditions_is_kept(
    file: NestedFile, runs: list[list[Measurement]]
) -> None:
    """The document is like a dict from conditions to the last value."""
    sidecar(file).unlink(missing_ok=True)
    expected = {}
    for run in runs:
        save_measured(file, run)
        expected.update({made.conditions: made for made in run})
    found = read_measured(file).measurements
    assert {made.conditions: made for made in found} == expected
    assert len(found) == len(expected)


def test_the_oldest_measurements_are_dropped(file: NestedFile) -> None:
    many = [measurement(threads=k) for k in range(1, MAX_MEASUREMENTS + 1)]
    save_measured(file, many)
    save_measured(file, [measurement(threads=1000)])
    threads = [made.threads for made in read_measured(file).measurements]
    assert threads == [*range(2, MAX_MEASUREMENTS + 1), 1000]


def test_measurements_of_another_file(file: NestedFile) -> None:
    save_measured(file, [measurement()])
    write_nested_file(file.path, small_state(), description(3, seed=4))
    other = open_nested_file(file.path)
    found = read_measured(other)
    assert list(found.measurements) == []
    assert found.problem == (
        f"{sidecar(file)}: holds measurements of another file; measure this one with `nestify bench` "
        "and --save"
    )
    save_measured(other, [measurement(THERE)])
    assert list(read_measured(other).measurements) == [measurement(THERE)]


def damaged_documents(document: dict[str, Any]) -> dict[str, Any]:
    """Return damaged copies of a document, by a part of the message that refuses them."""
    [first] = document["measurements"]
    [core, _, full] = first["levels"]

    def with_level(**changes: Any) -> Any:
        return {**document, "measurements": [{**first, "levels": [{**core, **changes}, full]}]}

    def with_machine(**changes: Any) -> Any:
        return {**document, "measurements": [{**first, "machine": {**first["machine"], **changes}}]}

    return {
        "'schema_version': Input should be 1": {**document, "schema_version": 2},
        "'more': Extra inputs": {**document, "more": 1},
        "'header_sha256'": {**document, "header_sha256": "0"},
        "there is no level 1 named 'tiny'": with_level(name="tiny"),
        "there is no level 4 named 'size-3'": {
            **document,
            "measurements": [{**first, "levels": [{**full, "level": 4}]}],
        },
        "levels are not in ascending order": {
            **document,
            "measurements": [{**first, "levels": [full, core]}],
        },
        "'measurements.0.levels': List should have at least 1": {
            **document,
            "measurements": [{**first, "levels": []}],
        },
        "median_seconds': Input should be greater than 0": with_level(median_seconds=0),
        "p95_seconds': Input should be a valid number": with_level(p95_seconds="1"),
        "over_full_quartiles": with_level(over_full_quartiles=[1.0]),
        "machine.cpu': String should match pattern": with_machine(cpu="red\x1b[31m"),
        "machine.torch': String should have at most 200": with_machine(torch="2" * 201),
        "machine.cores': Input should be a valid integer": with_machine(cores=True),
        "date': String should match pattern": {
            **document,
            "measurements": [{**first, "date": "yesterday"}],
        },
        "Input should be a valid dictionary": [],
    }


def test_damaged_documents(file: NestedFile) -> None:
    save_measured(file, [measurement()])
    document = json.loads(sidecar(file).read_text())
    texts = {problem: json.dumps(content) for problem, content in damaged_documents(document).items()}
    texts |= {
        "Expecting value": "",
        "is not a JSON number": '{"a": NaN}',
        "nested too deep": "[" * 100_000,
        "is given twice": '{"a": 1, "a": 1}',
        f"more than {MAX_BYTES} bytes": " " * (MAX_BYTES + 1),
    }
    for problem, text in texts.items():
        sidecar(file).write_text(text)
        assert_refused(file, problem)
    sidecar(file).write_bytes(b"\xff\xfe")
    assert_refused(file, "can't decode")
    sidecar(file).unlink()
    os.mkfifo(sidecar(file))  # which no process writes to
    found = read_report(file.path)
    assert "not a regular file" in found.measured_problem
    with pytest.raises(BadFileError, match="not a regular file"):
        check_savable(file)


def assert_refused(file: NestedFile, problem: str) -> None:
    """Check that the report works and shows the problem, and that saving does not touch the document."""
    report = read_report(file.path)
    assert list(report.measured) == []
    assert report.measured_problem.startswith(f"{sidecar(file)}: holds no measurements that can be read (")
    assert problem in report.measured_problem
    assert report.measured_problem.isprintable()
    assert report.measured_problem.endswith("; remove it")
    before = sidecar(file).read_bytes()
    with pytest.raises(BadFileError, match="holds no measurements that can be read"):
        save_measured(file, [measurement()])
    assert sidecar(file).read_bytes() == before


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), change=st.binary(max_size=3), cut=st.integers(0, 4))
def test_corrupted_bytes_never_stop_a_report(file: NestedFile, place: int, change: bytes, cut: int) -> None:
    sidecar(file).unlink(missing_ok=True)
    save_measured(file, [measurement()])
    text = sidecar(file).read_bytes()
    place %= len(text)
    sidecar(file).write_bytes(text[:place] + change + text[place + cut :])
    report = read_report(file.path)
    assert len(report.measured) == 1 or report.measured_problem or text != sidecar(file).read_bytes()
    assert all(made.levels[0].median_seconds > 0 for made in report.measured)


def test_a_name_too_long_for_a_document(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250)
    write_nested_file(path, small_state(), description(3))
    assert read_report(path).measured_problem == ""
    with pytest.raises(OutputError, match="cannot be written"):
        save_measured(open_nested_file(path), [measurement()])


def test_a_folder_that_cannot_be_written_to(file: NestedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    save_measured(file, [measurement()])
    before = sidecar(file).read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="make room"):
        save_measured(file, [measurement(THERE)])
    assert sidecar(file).read_bytes() == before
