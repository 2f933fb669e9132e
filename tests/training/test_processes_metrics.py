"""Two processes that learn labels, predictions or embeddings do as one with the combined batches."""

import csv
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from nestify.file.reader import open_nested_file
from nestify.recipe.metric import metric_of
from tests.cli.driver import DIGITS
from tests.training.processes import Processes
from tests.training.test_processes import OUTPUT, cut_apart, resume_apart, together, weights

RULES = {"even": "02468", "loop": "0689", "big": "56789"}
IMAGES = 21
"""Validation images, which two processes cannot share evenly."""


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of the labels of the digits; tests run in its folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "labels.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", *RULES])
        for split in ("train", "validation"):
            with tarfile.open(DIGITS / f"{split}.tar") as tar:
                names = [member.name for member in tar.getmembers() if member.isfile()]
            rows.writerows(
                [f"{split}/{name}", *(int(name[0] in digits) for digits in RULES.values())] for name in names
            )
    return path


LEARNED: Mapping[str, Mapping[str, object]] = {
    "labels": {"data.labels": "labels.csv", "finetune.epochs": 1, "train.class_weights": "balanced"},
    "predictions": {"data.unlabelled": True, "train.teacher": "both"},
    "embeddings": {"data.unlabelled": True, "model.kwargs.num_classes": 0},
}


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    "learned", ["labels", *(pytest.param(x, marks=pytest.mark.long) for x in LEARNED if x != "labels")]
)
def test_two_processes_learn_and_measure_as_one_does(learned: str) -> None:
    options = {
        **LEARNED[learned],
        "data.max_val": IMAGES,
        "data.max_train": 32,
        "train.epochs": 1,
        "train.lr": 1e-3,
    }
    one = {**options, "output": "one.safetensors"}
    two = {**options, "output": "two.safetensors", "train.sync_batch_norm": True, "train.batch_size": 8}
    together(1, one)
    together(2, two)
    paths = Path("one.safetensors"), Path("two.safetensors")
    own, other = (weights(path) for path in paths)
    for name, tensor in own.items():
        torch.testing.assert_close(
            other[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    levels = [open_nested_file(path).manifest.levels for path in paths]
    for single, shared in zip(*levels, strict=True):
        metric = metric_of(single.metrics)
        assert single.metrics.images == shared.metrics.images == IMAGES
        assert metric.score(shared.metrics) == pytest.approx(metric.score(single.metrics), abs=1e-3)


@pytest.mark.long  # test_processes.py has the same with one class per image
@pytest.mark.parametrize(("learned", "steps"), [("labels", 5), ("predictions", 2)])
def test_interrupted_processes_resume_to_the_same_bytes(learned: str, steps: int, table: Path) -> None:
    """Labels: after three steps of fine-tuning. Predictions: after levels were compared with the original."""
    options = {**LEARNED[learned], "data.max_train": 48, "train.epochs": 1, "train.batch_size": 8}
    options["train.eval_before"] = learned == "predictions"
    if learned == "labels":
        options["data.labels"] = str(table)
    together(2, options)
    assert Processes(2, cut_apart, steps, options).join() == [None, None]
    stages, _ = Processes(2, resume_apart, options).join()
    assert any("resuming at step" in text for text in stages)
    assert Path("node0", OUTPUT).read_bytes() == OUTPUT.read_bytes()
