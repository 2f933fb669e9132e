"""What goes wrong in a run is told: levels at chance, empty levels, still masks, numbers that are none."""

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
from nestify.training.health import RampWatch, check_collapse, check_empty
from nestify.training.observer import Observer

FEW: Mapping[str, object] = {
    "output": "run.nested.safetensors",
    "data.max_train": 96,
    "data.max_val": 100,
    "train.batch_size": 32,
    "train.recalibrate_batches": 1,
    "train.eval_before": False,
}


class Warned(Observer):
    """Remembers warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warned(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def warnings_of(options: Mapping[str, object]) -> list[str]:
    observer = Warned()
    api.compress("digits", {**FEW, **options}, observer=observer)
    return observer.warnings


def accuracy(top1: float, level: int = 0) -> Accuracy:
    return Accuracy(level, top1, top1, 1.0, 100, 1.0)


# Levels at chance


@pytest.mark.parametrize(
    ("original", "top1", "classes", "told"),
    [
        (90.0, 15.0, 10, True),
        (90.0, 15.1, 10, False),
        (45.0, 10.0, 10, True),
        (44.9, 10.0, 10, False),  # it was not worth much before
        (90.0, 50.0, 2, False),  # two classes: chance is too near to what a model can do
        (90.0, 1.5, 100, True),
    ],
)
def test_a_level_at_chance_has_collapsed(original: float, top1: float, classes: int, told: bool) -> None:
    results = [accuracy(top1, 1), accuracy(80.0, 2)]
    problems = check_collapse(accuracy(original), results, [classes] * 2, ["small", "full"])
    assert len(problems) == told
    if told:
        assert problems[0].startswith(f"level 1 (small) collapsed: its top-1 after training is {top1:.2f} %")


def test_a_run_whose_levels_all_collapsed_is_lost() -> None:
    broken = {"train.opt": "lion", "train.lr": 3.0, "train.epochs": 1, "levels": "0.9,0"}
    with pytest.raises(DivergedError) as error:
        warnings_of(broken)
    assert re.fullmatch(
        r"every level collapsed: none has more than [\d.]+ % top-1 after training, and the original has "
        r"[\d.]+ %; a smaller train\.lr may help, with --restart, because it would go the same way again "
        r"from step 3 of 3 of the training, which run\.resume\.safetensors keeps",
        str(error.value),
    )
    assert not Path("run.nested.safetensors").exists()
    assert Path("run.resume.safetensors").exists()


def test_a_single_level_that_collapsed_is_told_of_and_written() -> None:
    [told] = warnings_of({"train.epochs": 1, "levels": "0.9995,0"})
    assert told.startswith("level 1 (level1) collapsed: ")
    assert Path("run.nested.safetensors").exists()


def test_a_healthy_run_is_not_warned_of() -> None:
    assert warnings_of({"train.epochs": 1, "levels": "0.8,0"}) == []


def test_what_was_not_trained_has_not_collapsed() -> None:
    assert not any("collapsed" in text for text in warnings_of({"train.epochs": 0, "levels": "0.9995,0"}))
    left_out = {"train.epochs": 1, "levels": "0.9995,0", "level[1].weight": 0.0}
    assert not any("collapsed" in text for text in warnings_of(left_out))


# Empty levels


def nested_with(
    entry: int, names: int, make_model: Callable[..., nn.Module]
) -> tuple[NestedModel, list[str]]:
    """A model of two levels, of which some weights enter at another level than the first."""
    model = make_model("test_resnet")
    nested = NestedModel(model, describe_model(model), ["small", "full"])
    changed = list(nested.entry)[:names]
    for name in changed:
        nested.entry[name].fill_(entry)
    return nested, changed


def test_layers_without_a_weight(make_model: Callable[..., nn.Module]) -> None:
    nested, changed = nested_with(2, 2, make_model)
    nested.entry[changed[1]].view(-1)[0] = 1  # one weight is enough
    [told] = check_empty(nested)
    assert told.startswith(f"level 1 (small) has no weight left in {changed[0]}, so that")
    assert check_empty(nested_with(1, 2, make_model)[0]) == []
    nested, changed = nested_with(3, 2, make_model)  # of no level at all
    assert [text.split(",")[0] for text in check_empty(nested)] == [
        f"level {k} ({name}) has no weight left in {changed[0]} and 1 more"
        for k, name in ((1, "small"), (2, "full"))
    ]


def test_a_level_without_a_weight(make_model: Callable[..., nn.Module]) -> None:
    nested, _ = nested_with(2, 1000, make_model)
    assert check_empty(nested) == ["level 1 (small) has no maskable weight left; give it less sparsity"]


def test_the_plan_tells_of_empty_levels_before_the_work() -> None:
    emptied = {"train.epochs": 0, "levels": "0.9995,0", "schedule.score": "magnitude"}
    [told] = api.plan("digits", {**FEW, **emptied}).warnings
    assert told.startswith("level 1 (level1) has no weight left in ")
    assert warnings_of(emptied) == [told]
    assert api.plan("digits", {**FEW, **emptied, "schedule.score": "lamp"}).warnings == []


# Masks that stand still


def watched(*steps: tuple[float, float]) -> list[str]:
    """What is told of a level that was asked for sparsities and came out at others."""
    watch = RampWatch()
    for step, (asked, came) in enumerate(steps):
        watch.record(10 * step, [Level("small", asked)], [came])
    return watch.find_problems([Level("small", steps[-1][0])])


def test_masks_that_stand_still() -> None:
    assert watched((0.0, 0.0), (0.5, 0.5), (0.9, 0.9)) == []
    assert watched((0.0, 0.0), (0.5, 0.499), (0.51, 0.499)) == []  # blocks of weights need more than that
    [told] = watched((0.0, 0.0), (0.5, 0.5), (0.7, 0.5), (0.9, 0.5))
    assert told.startswith(
        "the masks of level 1 (small) stand still since step 10: its sparsity stayed 0.5000 while 0.9000 was"
    )


def test_a_run_whose_masks_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepper, "choose_weights", lambda *_: None)
    [told] = warnings_of({"train.epochs": 1, "levels": "0.8,0"})
    assert told.startswith("the masks of level 1 (level1) stand still since step 0")


# Numbers that are none


def test_a_diverged_run_keeps_its_last_good_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    take = stepper.Stepper.step

    def spoilt(self: stepper.Stepper, *given: Any) -> None:
        take(self, *given)
        if self.position.step == 5:
            with torch.no_grad():
                self.nested.shared_tensor("fc.weight").fill_(float("nan"))

    monkeypatch.setattr(stepper.Stepper, "step", spoilt)
    with pytest.raises(DivergedError) as error:
        warnings_of({"train.epochs": 3, "levels": "0.8,0"})
    assert re.fullmatch(
        r"the loss of level 1 is nan at step 6 of 9; a smaller learning rate or train\.clip_grad may help, "
        r"with --restart, because it would go the same way again from step 3 of 9 of the training, which "
        r"run\.resume\.safetensors keeps",
        str(error.value),
    )


def test_weights_that_are_no_numbers_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    take = stepper.Stepper.step

    def spoilt(self: stepper.Stepper, *given: Any) -> None:
        take(self, *given)
        if self.position.step == 6:  # the last of an epoch: no loss has seen it
            with torch.no_grad():
                self.nested.shared_tensor("fc.weight").fill_(float("nan"))

    monkeypatch.setattr(stepper.Stepper, "step", spoilt)
    with pytest.raises(
        DivergedError, match=r"network\.fc\.weight is not finite after step 6 of 9; .*step 3 of 9"
    ):
        warnings_of({"train.epochs": 3, "levels": "0.8,0"})
