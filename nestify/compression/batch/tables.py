"""Machine-readable results of a batch: a JSON line per job, and JUnit XML."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree as xml

from nestify.addresses import hide_passwords
from nestify.compression.batch.results import GATE, JobResult
from nestify.files import atomic_file

# characters that XML 1.0 does not allow, escaped or not
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_jsonl(path: Path, results: Sequence[JobResult]) -> None:
    """Write one JSON object per job and line. Raises OutputError if it cannot be written."""
    with atomic_file(path) as file:
        file.writelines(f"{hide_passwords(result.model_dump_json())}\n".encode() for result in results)


def write_junit(
    path: Path, suite: str, results: Sequence[JobResult], logs: Mapping[str, Sequence[str]], seconds: float
) -> None:
    """Write JUnit XML with a test case per job. Raises OutputError if it cannot be written.

    A missed gate or budget is a failure, anything else that went wrong an error; a job that did not start is
    skipped.

    Args:
        path: the file.
        jobs: the results.
        suite: name of the test suite.
        logs: last lines of the logs, by job.
        seconds: seconds of the whole batch.
    """
    cases = [_case(result, logs.get(result.name, ())) for result in results]
    counts = {
        "tests": len(cases),
        "failures": sum(case.find("failure") is not None for case in cases),
        "errors": sum(case.find("error") is not None for case in cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
    }
    attributes = {**{name: str(count) for name, count in counts.items()}, "time": f"{seconds:.3f}"}
    root = xml.Element("testsuites", attributes)
    xml.SubElement(root, "testsuite", {"name": _clean(suite), **attributes}).extend(cases)
    xml.indent(root)
    with atomic_file(path) as file:
        xml.ElementTree(root).write(file, encoding="utf-8", xml_declaration=True)


def _case(result: JobResult, log: Sequence[str]) -> xml.Element:
    seconds = 0.0 if result.earlier else result.seconds or 0.0
    case = xml.Element(
        "testcase",
        {"name": _clean(result.name), "classname": _clean(result.recipe), "time": f"{seconds:.3f}"},
    )
    message = {"message": _clean(result.message)}
    match result.state:
        case "done":
            text = "done by an earlier run, and skipped" if result.earlier else None
            if text:
                xml.SubElement(case, "system-out").text = text
        case "pending":
            xml.SubElement(case, "skipped", {"message": "not begun"})
        case _:
            kind = "failure" if result.exit_code == GATE else "error"
            detail = xml.SubElement(case, kind, {**message, "type": f"exit code {result.exit_code}"})
            detail.text = _clean("\n".join(log))
    return case


def _clean(text: str) -> str:
    return hide_passwords(_NOT_XML.sub("", text))


_TAIL_BYTES = 2**13


def progress(metrics: Path) -> str:
    """Return `train 120/500`: the phase and its steps at the last epoch; empty if unknown.

    Args:
        metrics: the job's `metrics.jsonl`, which another process writes.
    """
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            record = json.loads(line)
            return f"{record['event']} {record['step']}/{record['total_steps']}"
        except (
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
        ):  # the line is incomplete, or of another kind
            continue
    return ""
