"""The CSV and TensorBoard logs, compared with `metrics.jsonl`, also for runs that were interrupted."""

import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nestify.compression import compress as api
from nestify.errors import DataError, OutputError, RecipeError
from nestify.training.observer import Observer
from nestify.training.stepper import Stepper

OPTIONS: Mapping[str, object] = {  # 3 steps of fine-tuning and 11 of training in 4 epochs
    "output": "run.nested.safetensors",
    "data.max_train": 48,
    "data.max_val": 20,
    "train.batch_size": 16,
    "train.epochs": 3.6,
    "train.recalibrate_batches": 1,
    "train.eval_before": False,
    "train.eval_every": 2,
    "finetune.epochs": 1,
    "levels": "0.9,0",
}
TABLE = Path("run.csv")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*logs: str, observer: Observer | None = None, options: Mapping[str, object] = {}) -> None:
    api.compress("digits", {**OPTIONS, "train.log": list(logs), **options}, observer=observer)


def interrupt_run(*logs: str, steps: int) -> None:
    """Start a run, and interrupt it after `steps` steps, counted over both trainings."""
    original_step, done = Stepper.step, 0

    def counted_step(self: Stepper, *arguments: Any) -> None:
        nonlocal done
        if done == steps:
            raise DataError("interrupted")
        original_step(self, *arguments)
        done += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", counted_step)
        with pytest.raises(DataError):
            run(*logs)


def metrics(event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path("run.metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_per_epoch() -> None:
    TABLE.write_text("epoch,train_other\n1,2\n")  # a table of an older run
    run("csv")
    lines = metrics("train")
    table = rows(TABLE)
    assert len(table) == len(lines) == 4
    for row, line in zip(table, lines, strict=True):
        assert int(row["epoch"]) == line["epoch"]
        assert float(row["lr"]) == line["lr"]
        for name, key in (("loss", "losses"), ("top1", "top1"), ("sparsity", "sparsity")):
            assert [float(row[f"train_{name}_{k}"]) for k in (1, 2)] == line[key]
    validations = [line for line in metrics("evaluation") if line["moment"] in ("epoch", "after")]
    assert [row["eval_top1_1"] == "" for row in table] == [True, False, True, False]
    for row, validation in zip(table[1::2], validations, strict=True):
        for k, level in enumerate(validation["levels"], start=1):
            for name in ("top1", "top5", "loss"):
                assert float(row[f"eval_{name}_{k}"]) == level[name]
    [finetuned] = rows(Path("run.finetune.csv"))
    assert float(finetuned["train_loss_1"]) == metrics("finetune")[0]["losses"][0]


@pytest.mark.parametrize(
    "cuts", [(10,), *(pytest.param(cuts, marks=pytest.mark.long) for cuts in ((3, 10), (9,)))]
)
def test_a_resumed_run_continues_its_table(cuts: tuple[int, ...]) -> None:
    run("csv")
    uninterrupted = TABLE.read_bytes()
    for steps in cuts:
        interrupt_run("csv", steps=steps)
        run("csv")
        assert TABLE.read_bytes() == uninterrupted, steps


def test_a_table_that_cannot_be_written() -> None:
    TABLE.mkdir()
    with pytest.raises(OutputError, match=r"run\.csv is a folder; give the path"):
        run("csv")


@pytest.mark.parametrize("name", ["run.csv", "run.finetune.csv"])
@pytest.mark.parametrize(
    "content", [b"name,size\nmine,3\n", b"1,cat\n2,dog\n", b"id,class\n", b"epoch,lr\n1,2\n", b"\xff\xfe1,2"]
)
def test_a_file_that_is_not_a_log_is_left_unchanged(content: bytes, name: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(OutputError, match=rf"{name} cannot be written .*not a log.*choose another --output"):
        run("csv")
    assert Path(name).read_bytes() == content


def test_without_tensorboard_no_work_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(RecipeError, match=r"pip install 'nestify\[tensorboard\]'"):
        run("tensorboard")
    assert list(tmp_path.iterdir()) == []


def scalars() -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard reads: pairs of step and value, by tag."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("run.tensorboard")
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard() -> None:
    pytest.importorskip("tensorboard")
    run("tensorboard")
    run("tensorboard")  # replaces the events of the first run
    found = scalars()
    [finetuned] = metrics("finetune")
    assert found["finetune/loss/level1"] == [(3, pytest.approx(finetuned["losses"][0]))]
    ends = {3 + line["step"]: line["losses"][1] for line in metrics("train")}
    seen = dict(found["train/loss/level2"])
    assert {step: seen[step] for step in ends} == pytest.approx(ends)
    last = metrics("evaluation")[-1]["levels"][0]["top1"]
    assert found["validation/top1/level1"][-1] == (14, pytest.approx(last))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("steps", [7])
def test_a_resumed_run_continues_its_events(steps: int) -> None:
    pytest.importorskip("tensorboard")
    run("tensorboard")
    uninterrupted = scalars()
    interrupt_run("tensorboard", steps=steps)
    run("tensorboard")
    assert scalars() == uninterrupted
