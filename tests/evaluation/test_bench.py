"""From networks to measurements: what runs, how, and what is put back. No clock is looked at."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestify.accelerator import clock_of
from nestify.errors import BadFileError, RecipeError
from nestify.evaluation import on_engine
from nestify.evaluation.bench import bench, saved_measurement
from nestify.file.reader import NestedFile
from nestify.file.summary import read_report
from nestify.file.writer import write_nested_file
from tests.file.builders import description, small_state

Call = tuple[int, tuple[int, ...], int, bool]


class Recording(nn.Module):
    """Notes level, shape of the images, threads, and whether torch keeps nothing for a backward."""

    def __init__(self, level: int, calls: list[Call]) -> None:
        super().__init__()
        self.level, self.calls = level, calls

    def forward(self, images: Tensor) -> Tensor:
        threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
        self.calls.append((self.level, tuple(images.shape), threads, inference))
        return images.sum()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What was called, where the networks of a file are stand-ins."""
    made: list[Call] = []

    def stand_in(file: NestedFile, level: int) -> nn.Module:
        return Recording(level, made)

    monkeypatch.setattr(on_engine, "load_level", stand_in)
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "small.nested.safetensors"
    write_nested_file(path, small_state(), description(3))
    return path


def test_what_runs(path: Path, calls: list[Call]) -> None:
    threads = torch.get_num_threads()
    done = bench(path, batch_sizes=(2, 5, 2), threads=(1, 2), warmup=0, rounds=3)
    assert torch.get_num_threads() == threads
    made = [(m.threads, m.batch_size, m.rounds) for m in done.measurements]
    assert made == [(1, 2, 3), (1, 5, 3), (2, 2, 3), (2, 5, 3)]
    assert {call[3] for call in calls} == {True}
    for count, size, _ in made:
        own = [level for level, shape, n, _ in calls if (n, shape) == (count, (size, 3, 32, 32))]
        assert sorted(own) == [1] * 5 + [2] * 5 + [3] * 5  # two rounds warm up
    for measurement in done.measurements:
        assert [(level.level, level.name) for level in measurement.levels] == [
            *((1, "size-1"), (2, "size-2"), (3, "size-3"))
        ]
        assert measurement.levels[-1].over_full == 1
        assert measurement.dtype == "float32"
    assert done.saved is None
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("level", "due"), [("2", [2, 3]), ("size-1", [1, 3]), (3, [3]), ("all", [1, 2, 3])])
def test_the_full_level_always_runs(path: Path, calls: list[Call], level: int | str, due: list[int]) -> None:
    [measurement] = bench(path, level=level, batch_sizes=(1,), warmup=0, rounds=2).measurements
    assert [each.level for each in measurement.levels] == due


def test_threads_are_restored_after_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: NestedFile, level: int) -> nn.Module:
        return nn.Linear(1, 1)

    monkeypatch.setattr(on_engine, "load_level", broken)
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        bench(path, threads=(threads + 1,))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_sizes": (0,)}, "--batch-size 0 is not from 1 to 65536"),
        ({"batch_sizes": (1, -4)}, "--batch-size -4 is not"),
        ({"threads": (2000,)}, "--threads 2000 is not from 1 to 1024"),
        ({"warmup": -1.0}, "--warmup -1 is not"),
        ({"seconds": math.nan}, "--seconds nan is not"),
        ({"seconds": math.inf}, "--seconds inf is not"),
        ({"rounds": 1}, "--rounds 1 is not from 2 to 65536"),
        ({"level": "4"}, "has no level '4'"),
        ({"device": "toaster"}, "'toaster' is not available here"),
    ],
)
def test_options_out_of_range(path: Path, calls: list[Call], options: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        bench(path, **options)
    assert calls == []


def test_what_cannot_be_saved_is_refused_before_anything_runs(path: Path, calls: list[Call]) -> None:
    path.with_name("small.bench.json").write_text("my own notes")
    with pytest.raises(BadFileError, match="holds no measurements that can be read"):
        bench(path, save=True)
    assert calls == []


def test_an_accelerator_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls return before they are done: the clock must wait, and only then be read."""
    happened: list[object] = []

    def synchronize(device: torch.device) -> None:
        happened.append(device)

    def read() -> float:
        happened.append("read")
        return 1.0

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    monkeypatch.setattr(time, "perf_counter", read)
    for device in (torch.device("cuda:1"), torch.device("mps")):
        happened.clear()
        clock_of(device)()
        assert happened == [device, "read"]
    happened.clear()
    clock_of(torch.device("cpu"))()
    assert happened == ["read"]


def test_a_saved_measurement_is_found_by_its_conditions(path: Path, calls: list[Call]) -> None:
    done = bench(path, batch_sizes=(1, 4), threads=(1, 2), warmup=0, rounds=2, save=True)
    assert done.saved == path.with_name("small.bench.json")
    report = read_report(path)
    assert [made.threads for made in report.measured] == [1, 1, 2, 2]
    assert saved_measurement(report, 4, (2,), "cpu") == done.measurements[3]
    assert saved_measurement(report, 1, (1,), "auto") == done.measurements[0]
    with pytest.raises(BadFileError, match=r"no latency of this machine at batch 3 and 2 threads is saved"):
        saved_measurement(report, 3, (2,), "cpu")
