"""The log of a run next to its nested file: used if it fits, named if it does not."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nestify.file.history import MAX_BYTES, History, read_history
from nestify.file.summary import Report
from tests.report.reports import level, report

TRAIN = {"event": "train", "epoch": 1, "losses": [0.5, None], "top1": [60.0, 0.0], "step": 3, "lr": 0.1}


def evaluation(moment: str, *top1: float, epoch: int = 1) -> dict[str, Any]:
    levels = [
        {"level": k, "top1": value, "top5": 90.0, "loss": 1.0, "images": 100}
        for k, value in enumerate(top1, start=1)
    ]
    return {"event": "evaluation", "moment": moment, "epoch": epoch, "levels": levels}


AFTER = evaluation("after", 70.0, 90.0)
FEWER_IMAGES = {**AFTER, "levels": [{**score, "images": 50} for score in AFTER["levels"]]}
FITTING: list[dict[str, Any]] = [
    {"event": "warning", "text": "slow"},
    evaluation("original", 91.25, epoch=0),
    evaluation("before", 30.0, 50.0, epoch=0),
    {**TRAIN, "event": "finetune", "losses": [1.5], "top1": [10.0]},
    TRAIN,
    AFTER,
]


def made(folder: Path, lines: Sequence[object], n: int = 2) -> Report:
    """Return a report of a file whose levels have top-1 70 and 90, and write the log next to the file."""
    file = folder / "net.nested.safetensors"
    file.touch()
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    (folder / "net.metrics.jsonl").write_text(text)
    return report(*(level(k, 2) for k in range(1, n + 1)), path=str(file))


def test_the_log_of_the_run(tmp_path: Path) -> None:
    found = read_history(made(tmp_path, FITTING))
    assert found.problem == ""
    assert [line.losses for line in found.finetuning] == [[1.5]]
    assert [line.losses for line in found.training] == [[0.5, None]]
    scores = [(line.epoch, [score.top1 for score in line.levels]) for line in found.validation]
    assert scores == [(0, [30.0, 50.0]), (1, [70.0, 90.0])]


def test_a_slice_has_fewer_levels_than_the_log(tmp_path: Path) -> None:
    assert read_history(made(tmp_path, FITTING, n=1)).training


def test_without_a_log_there_is_no_history(tmp_path: Path) -> None:
    source = made(tmp_path, FITTING)
    (tmp_path / "net.metrics.jsonl").unlink()
    assert read_history(source) == History()
    assert read_history(report(path="https://example.test/net.nested.safetensors")) == History()


@pytest.mark.parametrize(
    "lines",
    [
        [],
        FITTING[:-1],
        [*FITTING[:-1], evaluation("after", 70.0)],
        [*FITTING[:-1], evaluation("after", 70.0, 90.5)],
        [*FITTING, evaluation("after", 70.0, 80.0)],
        [*FITTING, FEWER_IMAGES],
    ],
    ids=["empty", "has not ended", "fewer levels", "other accuracy", "later run", "other images"],
)
def test_the_log_of_another_run(lines: list[object], tmp_path: Path) -> None:
    found = read_history(made(tmp_path, lines))
    assert "net.metrics.jsonl is the log of another run" in found.problem
    assert not found.training
    assert not found.validation


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "NaN",
        '{"event": "train", "event": "train"}',
        {**TRAIN, "losses": ["0.5"]},
        {**TRAIN, "losses": [1e300]},
        {**TRAIN, "losses": [0.1] * 300},
        {**TRAIN, "top1": [101.0]},
        {**TRAIN, "epoch": -1},
        {**TRAIN, "epoch": 10**12},
        {**AFTER, "moment": "\x1b[31m"},
    ],
    ids=str,
)
def test_a_damaged_log(line: object, tmp_path: Path) -> None:
    found = read_history(made(tmp_path, [TRAIN, line, AFTER]))
    assert "net.metrics.jsonl" in found.problem
    assert "line 2" in found.problem
    assert "\x1b" not in found.problem
    assert not found.training


def test_other_values_are_other_events(tmp_path: Path) -> None:
    odd: list[object] = [[], None, 3, {"event": ["train"]}, {"event": "new"}]
    assert read_history(made(tmp_path, [*odd, *FITTING])).problem == ""


def test_what_cannot_be_a_log(tmp_path: Path) -> None:
    source = made(tmp_path, FITTING)
    log = tmp_path / "net.metrics.jsonl"
    log.write_bytes(b"\xff\xfe")
    assert "net.metrics.jsonl" in read_history(source).problem
    with log.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert "MiB" in read_history(source).problem
    log.unlink()
    os.mkfifo(log)
    assert "not a regular file" in read_history(source).problem
