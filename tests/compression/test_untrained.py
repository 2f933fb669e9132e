"""Levels without training: refitted unless `schedule.fit` is false, and never where training starts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import nestify
from nestify.compression import untrained
from nestify.compression.untrained import take_images
from nestify.file.summary import Report
from nestify.model.nested_model import NestedModel
from nestify.schedule.refit import Refitted, refit
from tests.cli.driver import CHECKPOINT

FEW = {
    "data.max_train": 200,
    "data.max_val": 100,
    "train.recalibrate_batches": 2,
    "train.batch_size": 50,
    "schedule.fit_images": 64,
}
CHANNELS = {"schedule.kind": "channel", "levels": "0.5,1"}
SPARSE = {"levels": "0.97,0"}


def compressed(path: Path, **options: Any) -> tuple[Report, dict[str, Tensor]]:
    """Return the report of a run, and the weights of its full level."""
    done = nestify.compress("digits", {**FEW, **options, "output": path}, observer=nestify.Observer())
    nested = nestify.load(path)
    assert done.report is not None
    return done.report, {n: t.detach() for n, t in nested.shared_tensors().items() if t.ndim > 1}


Run = tuple[Report, dict[str, Tensor]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Channels without training and without a fit."""
    path = tmp_path_factory.mktemp("plain") / "a"
    return compressed(path, **CHANNELS, **{"train.epochs": 0, "schedule.fit": False})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Channels without training, fitted."""
    return compressed(tmp_path_factory.mktemp("fitted") / "a", **CHANNELS, **{"train.epochs": 0})


@pytest.fixture(scope="module")
def sparse_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a sparse level without training and without a fit."""
    path = tmp_path_factory.mktemp("sparse") / "a"
    compressed(path, **SPARSE, **{"train.epochs": 0, "schedule.fit": False})
    return path


@pytest.mark.parametrize("kind", [pytest.param("sparse", marks=pytest.mark.long), "channels"])
def test_fit_false_keeps_the_weights_of_the_checkpoint(sparse_path: Path, plain: Run, kind: str) -> None:
    original = load_file(CHECKPOINT)
    sparse = {n: t.detach() for n, t in nestify.load(sparse_path).shared_tensors().items() if t.ndim > 1}
    for name, weight in (sparse if kind == "sparse" else plain[1]).items():
        values, expected = (tensor.flatten().sort().values for tensor in (weight, original[name]))
        assert torch.equal(values, expected), name  # channels are sorted


def test_refitted_levels_classify_better(plain: Run, fitted: Run) -> None:
    """The narrow level gains at least 10 points of 100 images, and the full level loses at most one image."""
    (before, _), (after, full) = ([level.top1 or 0 for level in made[0].levels] for made in (plain, fitted))
    assert after >= before + 10
    assert full >= plain[0].original["top1"] - 1.01


@pytest.mark.long
@pytest.mark.parametrize("levels", [SPARSE, CHANNELS])
def test_training_starts_from_the_original_weights(tmp_path: Path, levels: dict[str, Any]) -> None:
    """The untrained column differs; every tensor of the trained files is the same."""
    files, before = [], []
    short = {"train.epochs": 1, "data.max_train": 50, "data.max_val": 50}
    for fit in (False, True):
        path = tmp_path / str(fit)
        report, _ = compressed(path, **levels, **short, **{"schedule.fit": fit})
        before.append([level.top1_before for level in report.levels])
        files.append(load_file(path))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    assert before[0] != before[1]


def test_untrained_and_stored_levels_are_the_same(fitted: Run) -> None:
    report, _ = fitted
    assert [level.top1_before for level in report.levels] == [level.top1 for level in report.levels]


def test_a_full_level_keeps_its_statistics_if_nothing_was_fitted(sparse_path: Path) -> None:
    original = load_file(CHECKPOINT)
    full = nestify.load(sparse_path).own_tensors(2)
    assert all(torch.equal(tensor, original[name]) for name, tensor in full.items())


def test_images_are_counted_over_batches() -> None:
    batches = torch.arange(10.0).view(10, 1).split(4)
    assert take_images(batches, 6).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert take_images(batches, 99).flatten().tolist() == list(range(10))


class Notes(nestify.Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.warnings: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def noted(path: Path, **options: Any) -> Notes:
    notes = Notes()
    few = {"data.max_train": 64, "data.max_val": 20, "train.epochs": 0, "schedule.fit_images": 21}
    nestify.compress("digits", {**FEW, **few, **options, "output": path}, observer=notes)
    return notes


def test_a_full_level_that_loses_too_much_gets_more_protection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the end, the weights stay those of the checkpoint, with a warning."""
    used: list[float] = []

    def noted_refit(nested: NestedModel, images: Tensor, protect: float, original: nn.Module) -> Refitted:
        used.append(protect)
        return refit(nested, images, protect, original)

    monkeypatch.setattr(untrained, "refit", noted_refit)
    monkeypatch.setattr(untrained, "MOST_POINTS_BY_FIT", -101)  # more than it can gain
    notes = noted(tmp_path / "a", **SPARSE)
    assert used == sorted(set(used))
    assert len(used) == 3
    assert any("level 2" in text and "schedule.fit_images" in text for text in notes.warnings)
    original, nested = load_file(CHECKPOINT), nestify.load(tmp_path / "a")
    assert all(torch.equal(tensor, original[name]) for name, tensor in nested.shared_tensors().items())


@pytest.mark.long
def test_levels_are_refitted_to_the_original_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the full level is sparse, so that its batch norm is not the original network's."""
    expected, differing = load_file(CHECKPOINT), []

    def noted_refit(nested: NestedModel, images: Tensor, protect: float, original: nn.Module) -> Refitted:
        found = original.state_dict()
        differing.append([name for name, tensor in expected.items() if not torch.equal(found[name], tensor)])
        return refit(nested, images, protect, original)

    monkeypatch.setattr(untrained, "refit", noted_refit)
    monkeypatch.setattr(untrained, "MOST_POINTS_BY_FIT", -101)
    noted(tmp_path / "a", levels="0.97,0.5")
    assert differing == [[], [], []]


def test_fit_images_are_limited_by_their_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrained, "MOST_PIXELS", 20 * 32 * 32 + 1)
    assert any("on 20 images" in text for text in noted(tmp_path / "a", **SPARSE).stages)


def test_statistics_are_related_if_the_original_would_lose_by_measured_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it loses is shown in both cases."""
    statistics = []
    for limit in (101, -101):
        monkeypatch.setattr(untrained, "MOST_POINTS_BY_STATISTICS", limit)
        path = tmp_path / str(limit)
        shown = [text for text in noted(path, **SPARSE).stages if "points" in text]
        assert len(shown) == 1
        assert ("related" in shown[0]) == (limit < 0)
        statistics.append(nestify.load(path).own_tensors(1))
    assert any(not torch.equal(tensor, statistics[1][name]) for name, tensor in statistics[0].items())
