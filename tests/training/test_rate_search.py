"""`--lr auto`: the search is bounded, leaves no trace but the rate, and says when it found none."""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from nestify.compression import compress as api
from nestify.compression.extend import extend
from nestify.errors import DataError
from nestify.file.reader import open_nested_file
from nestify.recipe.augment_options import AugmentOptions
from nestify.training import rate_search
from nestify.training.observer import Observer, Phase, RateSearch
from nestify.training.random_states import random_states
from nestify.training.rate_search import plan_rounds, search_rate, search_steps
from nestify.training.stepper import Stepper
from nestify.training.task import NestedTask
from tests.cli.driver import CHECKPOINT, DIGITS, Outcome, nestify
from tests.training.processes import Processes
from tests.training.test_loop import LEVELS, Squares, make_task, options

MakeModel = Callable[..., nn.Module]
OUTPUT = Path("run.nested.safetensors")
SMALL: Mapping[str, object] = {  # 12 steps of training, which draw random numbers
    "output": str(OUTPUT),
    "data.max_train": 48,
    "data.max_val": 20,
    "train.batch_size": 8,
    "train.epochs": 2,
    "train.recalibrate_batches": 1,
    "train.eval_before": False,
    "train.lr": "auto",
    "augment.mixup": 0.2,
    "model.kwargs.drop_rate": 0.3,
    "levels": "0.9,0",
}
SEARCH = 26
"""Steps of the smallest search."""


@pytest.fixture
def _short_runs_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs of a few steps search, and work in a folder of the test's own."""
    monkeypatch.setattr(rate_search, "SHARE", 2.5)
    monkeypatch.setattr(rate_search, "LEAST_FALL", 0.0)
    monkeypatch.chdir(tmp_path)


class Recorder(Observer):
    """Records searches and warnings."""

    def __init__(self) -> None:
        self.searches: dict[Phase, RateSearch] = {}
        self.warnings: list[str] = []

    def searched(self, phase: Phase, search: RateSearch) -> None:
        self.searches[phase] = search

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def run(**more: object) -> tuple[bytes, Recorder]:
    """Finish a run; return the bytes of its nested file, and what its observer received."""
    recorder = Recorder()
    api.compress("digits", {**SMALL, **more}, observer=recorder)
    return OUTPUT.read_bytes(), recorder


@pytest.mark.parametrize("steps", [0, 1, 13, 259, 260, 312, 999, 1000, 10**6])
def test_a_search_takes_at_most_a_tenth_of_the_training_and_a_hundred_steps(steps: int) -> None:
    assert 0 <= search_steps(steps) <= min(100, steps / 10)
    assert (plan_rounds(steps) == (0, 0)) == (steps < 260)
    if steps >= 1000:
        assert search_steps(steps) == 100


@pytest.mark.long
@pytest.mark.usefixtures("_short_runs_search")
def test_a_run_is_the_same_as_one_with_the_rates_that_it_finds() -> None:
    more = {"finetune.epochs": 2, "model.pretrained": False, "model.checkpoint": "none"}
    searching, recorder = run(**more, **{"finetune.lr": "auto"})
    found = recorder.searches
    assert set(found) == {"finetune", "train"}
    assert any(search.best for search in found.values())
    assert all(len(search.trials) == 10 for search in found.values())
    recipe = open_nested_file(OUTPUT).manifest.recipe
    assert recipe["train"]["lr"] == found["train"].lr
    assert recipe["finetune"]["lr"] == found["finetune"].lr
    lines = [json.loads(line) for line in Path("run.metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if line["event"] == "lr_search"] == [
        found["finetune"].lr,
        found["train"].lr,
    ]
    rates = {f"{phase}.lr": search.lr for phase, search in found.items()}
    plain, recorder = run(**more, **rates)
    assert not recorder.searches
    assert plain == searching


@pytest.mark.long
@pytest.mark.usefixtures("_short_runs_search")
def test_a_resumed_run_does_not_search_again(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run()
    done, original_step = 0, Stepper.step

    def step(self: Stepper, *given: Any) -> None:
        nonlocal done
        if done == SEARCH + 8:
            raise DataError("interrupted")
        original_step(self, *given)
        done += 1

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", step)
        with pytest.raises(DataError, match="interrupted"):
            run()
    resumed, recorder = run()
    assert not recorder.searches
    assert resumed == whole


@pytest.mark.long
@pytest.mark.usefixtures("_short_runs_search")
def test_levels_that_are_trained_in_stages_or_added_later_use_one_search() -> None:
    run(**{"levels": "0.9,0", "level[1].freeze": True})
    run(**{"levels": "0.9,0.5", "output": "base", "train.epochs": 0, "train.lr": 0.01, "schedule.fit": False})
    recorder = Recorder()
    given = {
        "train.lr": "auto",
        "train.epochs": 2,
        "output": "top",
        "model.checkpoint": str(CHECKPOINT),
        "data.path": str(DIGITS),
    }
    extend("base", "0", given, observer=recorder)
    added = open_nested_file("top").manifest.levels[-1]
    assert added.extension is not None
    assert added.extension.recipe["train"]["lr"] == recorder.searches["train"].lr


def short_run(_: int, words: tuple[str, ...]) -> Outcome:
    """A short run that searches, in one of several processes."""
    rate_search.SHARE = 2.5
    return nestify(*words)


@pytest.mark.long
def test_two_processes_search_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("compress", "digits", "--max-train", "96", "--max-val", "20", "--batch-size", "4")
    words += ("--epochs", "1", "--levels", "0.9,0", "--device", "cpu", "-o", str(OUTPUT))
    words += ("--set", "train.eval_before=false", "--set", "train.recalibrate_batches=1")

    def train(lr: str) -> tuple[bytes, float]:
        done = Processes(2, short_run, (*words, "--lr", lr)).join()
        assert [each.code for each in done] == [0, 0], done[0].err
        return OUTPUT.read_bytes(), open_nested_file(OUTPUT).manifest.recipe["train"]["lr"]

    searched, found = train("auto")
    assert isinstance(found, float)
    lines = Path("run.metrics.jsonl").read_text().splitlines()
    [search] = [line for line in map(json.loads, lines) if line["event"] == "lr_search"]
    assert search["lr"] == found
    assert len(search["trials"]) == 10
    assert train(str(found))[0] == searched


def test_a_short_run_takes_the_default_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, recorder = run()
    assert open_nested_file(OUTPUT).manifest.recipe["train"]["lr"] == 0.01
    [warning] = [text for text in recorder.warnings if "train.lr" in text]
    assert "12 training steps are too few" in warning
    assert "0.01" in warning


class Batches(Squares):
    """Batches that count what was left out, as a loader does."""

    left_out = 0


def search(task: NestedTask, images: int = 16, **more: Any) -> RateSearch:
    return search_rate(
        task, Batches(12, images), options(), AugmentOptions(), steps=260, levels=LEVELS, **more
    )  # type: ignore[arg-type]


@pytest.mark.long
def test_a_search_changes_neither_model_nor_random_numbers(make_model: MakeModel) -> None:
    """Mixing draws random numbers; the soft targets are measured without it."""
    task = make_task(make_model)
    before = deepcopy(task.get_trainable_module().state_dict())
    settings = task.sandwich, task.step
    states = random_states(torch.device("cpu"))
    task.criterion = SoftTargetCrossEntropy()
    mixed = AugmentOptions(mixup=0.5)  # draws NumPy's random numbers
    found = search_rate(task, Batches(12), options(), mixed, steps=260, levels=LEVELS)  # type: ignore[arg-type]
    assert found.best is not None
    after = task.get_trainable_module().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (task.sandwich, task.step) == settings
    assert torch.equal(random_states(torch.device("cpu"))["torch"], states["torch"])
    assert torch.equal(random_states(torch.device("cpu"))["numpy"][0], states["numpy"][0])
    task.criterion = nn.CrossEntropyLoss()
    plain = search(task)
    assert found.start == pytest.approx(plain.start, rel=1e-5)


@pytest.mark.long
def test_the_best_of_the_second_round_is_scaled_to_the_length_of_the_training(make_model: MakeModel) -> None:
    task = make_task(make_model)
    found = search(task)
    first, second = found.trials[:7], found.trials[7:]
    assert [trial.lr for trial in first] == [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    assert {trial.steps for trial in first} == {2}
    assert {trial.steps for trial in second} == {(26 - 14) // 3}
    best_three = sorted(first, key=lambda trial: trial.loss)[:3]
    assert [trial.lr for trial in second] == sorted(trial.lr for trial in best_three)
    best = min(second, key=lambda trial: trial.loss)
    assert best.loss < found.start
    assert found.lr**4 == pytest.approx(best.lr**4 * 4 / 260, rel=0.2)
    assert search(task) == found


@pytest.mark.long
def test_optimizers_that_scale_gradients_have_lower_rates(make_model: MakeModel) -> None:
    task = make_task(make_model)
    found = search_rate(
        task, Batches(12, 16), options(opt="adamw"), AugmentOptions(), steps=260, levels=LEVELS
    )  # type: ignore[arg-type]
    assert [trial.lr for trial in found.trials[:7]] == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01]


@pytest.mark.long
def test_the_result_is_not_below_the_lowest_rate_of_the_schedule(make_model: MakeModel) -> None:
    chosen = options(min_lr=0.5)
    task = make_task(make_model)
    found = search_rate(task, Batches(12), chosen, AugmentOptions(), steps=260, levels=LEVELS)  # type: ignore[arg-type]
    assert found.lr >= 0.5 or found.problem


class Constant(nn.Module):
    """A loss that does not depend on the weights."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return logits.sum() * 0 + self.value


@pytest.mark.parametrize(
    ("value", "problem"),
    [(nan, "not finite"), pytest.param(inf, "not finite", marks=pytest.mark.long), (1.0, "lowered")],
)
def test_a_search_without_a_result_gives_the_default(
    value: float, problem: str, make_model: MakeModel
) -> None:
    task = make_task(make_model)
    task.criterion = Constant(value)
    found = search(task, images=2)
    assert found.lr == 0.01
    assert found.best is None
    assert problem in found.problem


class Raised(nn.Module):
    """The usual loss plus a constant."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, target) + self.offset


@pytest.mark.parametrize(("offset", "found_one"), [(0.0, True), (1000.0, False)])
def test_a_loss_that_hardly_falls_cannot_choose(
    offset: float, found_one: bool, make_model: MakeModel
) -> None:
    task = make_task(make_model)
    task.criterion = Raised(offset)
    found = search(task)
    assert (found.best is not None) == found_one
    if not found_one:
        assert found.lr == 0.01
        assert "lowered the loss by 1% or more" in found.problem


def test_one_batch_is_too_few_to_search_in(make_model: MakeModel) -> None:
    found = search_rate(make_task(make_model), Batches(1), options(), AugmentOptions(), steps=260)  # type: ignore[arg-type]
    assert (found.lr, found.trials) == (0.01, ())
    assert "batch" in found.problem


def test_a_plan_says_that_the_rate_will_be_searched() -> None:
    words = ("compress", "digits", "--lr", "auto", "--dry-run")
    assert nestify(*words).out.count("train.lr = auto") == 1
    long = nestify(*words, "--epochs", "20", "--json")
    assert json.loads(long.out)["search_steps"] == {"train": search_steps(440)}
    assert "search_steps" not in json.loads(nestify("compress", "digits", "--dry-run", "--json").out)
