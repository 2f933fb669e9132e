"""Signals to a batch, which reach its jobs, and a batch that is gone, which takes its jobs with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.compression.batch.builders import COMMAND, Fakes, is_alive, until

RUN = """
import sys
from nestify.cli.app import main
import nestify.compression.batch.batch as batch
from functools import partial
batch.run_batch = partial(batch.run_batch, command=eval(sys.argv.pop()))
main()
"""


def start(fakes: Fakes, recipes: list[str], *words: str) -> "subprocess.Popen[str]":
    """The command line in a process of its own, with fake jobs, once they are ready."""
    command = [sys.executable, "-c", RUN, "batch", *recipes, "--out", "out", "--max-parallel", "2", *words]
    process = subprocess.Popen(
        [*command, repr(COMMAND)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=fakes.folder,
        start_new_session=True,
    )
    until(lambda: len(fakes.said("ready")) == 2)
    return process


def pids(fakes: Fakes) -> list[int]:
    return [int(word) for line in fakes.said("ready") for word in line[1:]]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        *(pytest.param(number, 143, marks=pytest.mark.long) for number in (signal.SIGTERM, signal.SIGUSR1)),
    ],
)
def test_a_signal_is_passed_on_once(number: int, code: int, fakes: Fakes) -> None:
    process = start(fakes, fakes.recipes(a="wait", b="wait", c="wait"))
    os.killpg(process.pid, number)  # as a terminal does; the jobs are in sessions of their own
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "0 of 3 jobs done in out" in out
    assert f"{signal.Signals(number).name}: waiting for the jobs to save checkpoints" in err
    assert [(line["state"], line["exit_code"]) for line in fakes.lines()] == [
        ("interrupted", code),
        ("interrupted", code),
        ("pending", None),
    ]
    assert all((fakes.folder / "out" / name / "wait.resume.safetensors").exists() for name in "ab")
    root = ElementTree.parse(fakes.folder / "out" / "junit.xml").getroot()
    assert (root.get("errors"), root.get("skipped")) == ("2", "1")
    assert not any(map(is_alive, pids(fakes)))


def test_a_second_signal_ends_all_at_once(fakes: Fakes) -> None:
    process = start(fakes, fakes.recipes(a="stubborn", b="stubborn"))
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    until(lambda: "waiting for the jobs to save checkpoints" in process.stderr.readline())  # type: ignore[union-attr]
    assert all(map(is_alive, pids(fakes)))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == (
        "nestify: interrupted; the jobs were ended; the same command resumes from their last checkpoints"
    )
    assert [(line["state"], line["exit_code"]) for line in fakes.lines()] == [("interrupted", 137)] * 2
    until(lambda: not any(map(is_alive, pids(fakes))))


@pytest.mark.parametrize("kind", ["wait", "stubborn"])
def test_jobs_end_with_a_batch_that_is_killed(
    kind: str, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_PATIENCE", "0.3")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    process = start(fakes, fakes.recipes(a=kind, b=kind))
    assert all(map(is_alive, pids(fakes)))
    process.kill()
    process.communicate(timeout=30)
    until(lambda: not any(map(is_alive, pids(fakes))))
    states = [line["state"] for line in fakes.lines()]
    assert states == ["running", "running"]
    if kind == "wait":
        assert all((fakes.folder / "out" / name / "wait.resume.safetensors").exists() for name in "ab")


def test_what_a_killed_job_leaves_running_is_ended(fakes: Fakes) -> None:
    process = start(fakes, fakes.recipes(a="stubborn", b="wait"))
    jobs = {line[0]: [int(word) for word in line[1:]] for line in fakes.said("ready")}
    parent, child = jobs["a"]
    os.kill(parent, signal.SIGKILL)
    until(lambda: not is_alive(child))
    os.kill(jobs["b"][0], signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert [(line["state"], line["exit_code"]) for line in fakes.lines()] == [
        ("failed", 137),
        ("failed", 143),
    ]
