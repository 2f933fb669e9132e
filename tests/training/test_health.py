"""Failures of a run are reported: levels at chance, empty levels, masks that stop changing, NaN weights."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nestify.compression import compress as api
from nestify.errors import DivergedError
from nestify.evaluation.accuracy import Accuracy
from nestify.model.nested_model import NestedModel
from nestify.model.spec import describe_model
from nestify.recipe.levels import Level
from nestify.training import stepper
from nestify.training.health import RampWatch, check_collapse, check_empty, check_gain
from nestify.training.observer import Observer

FEW: Mapping[str, object] = {
    "output": "run.nested.safetensors",
    "data.max_train": 96,
    "data.max_val": 100,
    "train.batch_size": 32,
    "train.recalibrate_batches": 1,
    "train.eval_before": False,
    "schedule.fit": False,
}


class WarningRecorder(Observer):
    """Records warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warned(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def warnings_of(options: Mapping[str, object]) -> list[str]:
    observer = WarningRecorder()
    api.compress("digits", {**FEW, **options}, observer=observer)
    return observer.warnings


def accuracy(top1: float, level: int = 0) -> Accuracy:
    return Accuracy(level, top1, top1, 1.0, 100, 1.0)


# Levels at chance


@pytest.mark.parametrize(
    ("original", "top1", "classes", "collapsed"),
    [
        (90.0, 15.0, 10, True),
        (90.0, 15.1, 10, False),
        (45.0, 10.0, 10, True),
        (44.9, 10.0, 10, False),  # the original was not much better than chance
        (90.0, 50.0, 2, False),  # with two classes, chance is too close to what a model can reach
        (90.0, 1.5, 100, True),
    ],
)
def test_a_level_at_chance_has_collapsed(original: float, top1: float, classes: int, collapsed: bool) -> None:
    results = [accuracy(top1, 1), accuracy(80.0, 2)]
    problems = check_collapse(accuracy(original), results, [classes] * 2, ["small", "full"])
    assert len(problems) == collapsed
    if collapsed:
        assert problems[0].startswith(f"level 1 (small) collapsed: its top-1 after training is {top1:.2f} %")
        assert "a smaller --lr (train.lr), more --epochs, or a larger level" in problems[0]


@pytest.mark.parametrize(
    ("before", "after", "images", "worse"),
    [
        (77.2, 20.6, 359, True),
        (50.0, 48.0, 20_000, True),
        (50.0, 49.0, 1_000_000, False),  # 1 point or less
        (50.0, 45.0, 200, False),  # two standard errors are 10 points
        (99.44, 99.16, 359, False),
        (20.0, 80.0, 359, False),
    ],
)
def test_a_level_that_training_made_worse(before: float, after: float, images: int, worse: bool) -> None:
    def score(level: int, top1: float) -> Accuracy:
        return Accuracy(level, top1, top1, 1.0, images, 1.0)

    untrained, trained = [score(1, before), score(2, 90.0)], [score(1, after), score(2, 90.0)]
    problems = check_gain(untrained, trained, ["small", "full"])
    assert len(problems) == worse
    if worse:
        words = f"level 1 (small) has a top-1 of {after:.2f} % after training, and {before:.2f} % without; "
        assert problems[0].startswith(words)
        assert "--epochs 0 keeps the levels without training" in problems[0]
    assert check_gain([], trained, ["small", "full"]) == []


@pytest.mark.long
def test_a_run_that_makes_a_level_worse_says_so() -> None:
    """One epoch of few images does not reach what refitted weights have without training."""
    options = {"schedule.kind": "channel", "levels": "0.25,0.5,1", "train.epochs": 1, "data.max_val": None}
    more = {"train.eval_before": True, "schedule.fit": True}
    found = warnings_of({**options, **more})
    assert any(re.match(r"level 1 \(level1\) has a top-1 of .* after training", each) for each in found)


def test_a_run_whose_levels_all_collapsed_fails() -> None:
    broken = {"train.opt": "lion", "train.lr": 3.0, "train.epochs": 1, "levels": "0.9,0"}
    with pytest.raises(DivergedError) as error:
        warnings_of(broken)
    assert re.fullmatch(
        r"every level collapsed: .* [\d.]+ %, .* original model is [\d.]+ %; a smaller --lr \(train\.lr\) "
        r"may help, with --restart, .* run\.resume\.safetensors from step 3 of 3 of the training .*",
        str(error.value),
    )
    assert not Path("run.nested.safetensors").exists()
    assert Path("run.resume.safetensors").exists()


def test_a_single_level_that_collapsed_is_reported_and_written() -> None:
    [warning] = warnings_of({"train.epochs": 1, "levels": "0.9995,0"})
    assert warning.startswith("level 1 (level1) collapsed: ")
    assert Path("run.nested.safetensors").exists()


def test_a_healthy_run_gives_no_warning() -> None:
    assert warnings_of({"train.epochs": 1, "levels": "0.8,0"}) == []


def test_a_level_that_was_not_trained_has_not_collapsed() -> None:
    assert not any("collapsed" in text for text in warnings_of({"train.epochs": 0, "levels": "0.9995,0"}))
    left_out = {"train.epochs": 1, "levels": "0.9995,0", "level[1].weight": 0.0}
    assert not any("collapsed" in text for text in warnings_of(left_out))


# Empty levels


def nested_with(
    entry: int, names: int, make_model: Callable[..., nn.Module]
) -> tuple[NestedModel, list[str]]:
    """Return a model of two levels in which the first `names` weights enter at level `entry`."""
    model = make_model("test_resnet")
    nested = NestedModel(model, describe_model(model), ["small", "full"])
    changed = list(nested.entry)[:names]
    for name in changed:
        nested.entry[name].fill_(entry)
    return nested, changed


def test_layers_without_a_weight(make_model: Callable[..., nn.Module]) -> None:
    nested, changed = nested_with(2, 2, make_model)
    nested.entry[changed[1]].view(-1)[0] = 1  # one weight is enough
    [sentence] = check_empty(nested)
    assert sentence.startswith(f"level 1 (small) has no weight left in {changed[0]}, so that")
    assert check_empty(nested_with(1, 2, make_model)[0]) == []
    nested, changed = nested_with(3, 2, make_model)  # no level uses these weights
    assert [text.split(",")[0] for text in check_empty(nested)] == [
        f"level {k} ({name}) has no weight left in {changed[0]} and 1 more"
        for k, name in ((1, "small"), (2, "full"))
    ]


def test_a_level_without_a_weight(make_model: Callable[..., nn.Module]) -> None:
    nested, _ = nested_with(2, 1000, make_model)
    assert check_empty(nested) == ["level 1 (small) has no maskable weight left; give it less sparsity"]


def test_the_plan_warns_of_empty_levels_before_the_work() -> None:
    emptied = {"train.epochs": 0, "levels": "0.9995,0", "schedule.score": "magnitude"}
    [warning] = api.plan("digits", {**FEW, **emptied}).warnings
    assert warning.startswith("level 1 (level1) has no weight left in ")
    assert warnings_of(emptied) == [warning]
    assert api.plan("digits", {**FEW, **emptied, "schedule.score": "lamp"}).warnings == []


# Masks that stop changing


def find_problems(*steps: tuple[float, float]) -> list[str]:
    """Return what is reported for a level with these target sparsities and reached sparsities."""
    watch = RampWatch()
    for step, (target, reached) in enumerate(steps):
        watch.record(10 * step, [Level("small", target)], [reached])
    return watch.find_problems([Level("small", steps[-1][0])])


def test_masks_that_stop_changing() -> None:
    assert find_problems((0.0, 0.0), (0.5, 0.5), (0.9, 0.9)) == []
    assert find_problems((0.0, 0.0), (0.5, 0.499), (0.51, 0.499)) == []  # too little for blocks of weights
    [problem] = find_problems((0.0, 0.0), (0.5, 0.5), (0.7, 0.5), (0.9, 0.5))
    assert re.fullmatch(
        r"the masks of level 1 \(small\) .* since step 10: .* 0\.5000, .* 0\.9000; .* schedule\.skip", problem
    )


def test_a_run_whose_masks_never_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepper, "choose_weights", lambda *_: None)
    [warning] = warnings_of({"train.epochs": 1, "levels": "0.8,0", "schedule.ramp": 0.5})
    assert re.match(r"the masks of level 1 \(level1\) .* since step 0:", warning)


# Losses and weights that are not finite


def test_a_diverged_run_keeps_its_last_good_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    original_step = stepper.Stepper.step

    def damaging_step(self: stepper.Stepper, *given: Any) -> None:
        original_step(self, *given)
        if self.position.step == 5:
            with torch.no_grad():
                self.nested.shared_tensor("fc.weight").fill_(float("nan"))

    monkeypatch.setattr(stepper.Stepper, "step", damaging_step)
    with pytest.raises(DivergedError) as error:
        warnings_of({"train.epochs": 3, "levels": "0.8,0"})
    assert re.fullmatch(
        r"the loss of level 1 is nan at step 6 of 9; a smaller learning rate or train\.clip_grad may help, "
        r"with --restart, .* run\.resume\.safetensors from step 3 of 9 of the training .*",
        str(error.value),
    )


def test_weights_that_are_not_finite_are_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    original_step = stepper.Stepper.step

    def damaging_step(self: stepper.Stepper, *given: Any) -> None:
        original_step(self, *given)
        if self.position.step == 6:  # the last step of an epoch: no later loss depends on it
            with torch.no_grad():
                self.nested.shared_tensor("fc.weight").fill_(float("nan"))

    monkeypatch.setattr(stepper.Stepper, "step", damaging_step)
    with pytest.raises(
        DivergedError, match=r"network\.fc\.weight is not finite after step 6 of 9; .*step 3 of 9"
    ):
        warnings_of({"train.epochs": 3, "levels": "0.8,0"})
