"""Options that a recipe leaves open: a run without them equals one that gives their values."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from nestify.compression.compress import compress, plan
from nestify.compression.defaults import with_usual_rates
from nestify.errors import NestifyError, RecipeError
from nestify.file.reader import open_nested_file
from nestify.recipe.recipe import load_recipe
from nestify.training.observer import Observer
from tests.data.builders import make_folder

KWARGS = {"model.kwargs.channels": [8, 8, 16, 16], "model.input_size": 32}


class Warnings(Observer):
    """Records warnings."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warned(self, text: str) -> None:
        """Keep the text."""
        self.texts.append(text)


def save_network(path: Path, num_classes: int) -> str:
    """Save a small network with random weights; return its path."""
    channels = (8, 8, 16, 16)
    model = timm.create_model("test_resnet", num_classes=num_classes, channels=channels, zero_init_last=False)
    save_file(model.state_dict(), path)
    return str(path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A checkpoint of a small network of seven classes."""
    return save_network(tmp_path / "seven.safetensors", 7)


def run(
    data: Path, checkpoint: str, output: str, options: Mapping[str, object]
) -> tuple[bytes, dict[str, object], Sequence[str]]:
    """Compress without training; return the file, the stored recipe and the warnings."""
    given = {**KWARGS, "data.path": str(data), "model.checkpoint": checkpoint, "train.epochs": 0}
    given["schedule.fit"] = False
    seen = Warnings()
    done = compress("test_resnet", {**given, "output": output, "levels": "0.5,0", **options}, observer=seen)
    return done.path.read_bytes(), dict(done.manifest.recipe), seen.texts


@pytest.mark.long
def test_a_flat_folder_equals_a_run_with_the_chosen_values(tmp_path: Path, checkpoint: str) -> None:
    """Ten images of each of three classes, for a checkpoint of seven and a batch of 64."""
    data = make_folder(tmp_path / "photos", {"a": 10, "b": 10, "c": 10})
    chosen = {
        "data.holdout": 0.1,  # an image of each class
        "model.new_head": True,
        "finetune.epochs": 50,  # each is one step
        "train.batch_size": 27,
    }
    open_options, recipe, warnings = run(data, checkpoint, str(tmp_path / "open" / "x.safetensors"), {})
    all_given, _, silence = run(data, checkpoint, str(tmp_path / "given" / "x.safetensors"), chosen)
    assert open_options == all_given
    for key, value in chosen.items():
        section, _, name = key.partition(".")
        assert recipe[section][name] == value  # type: ignore[index]
    flags = ("--holdout", "--batch-size", "classifier", "--finetune-epochs")
    assert [flag in text for flag, text in zip(flags, warnings, strict=True)] == [True] * 4
    assert "seed 42" in warnings[0]
    assert "7 classes" in warnings[2]
    assert "has 3" in warnings[2]
    assert not silence


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path) -> None:
    for name in ("open", "given"):
        (tmp_path / name).mkdir()


def planned(data: Path, checkpoint: str, **options: object) -> tuple[int, int, int]:
    """Return the numbers of training and validation images, and of steps of fine-tuning."""
    given = {key.replace("__", "."): value for key, value in options.items()}
    options = {**KWARGS, "data.path": str(data), "model.checkpoint": checkpoint, **given}
    made = plan("test_resnet", options, observer=Observer())
    return made.train_images, made.val_images, made.finetune_steps


def test_each_option_alone(tmp_path: Path, checkpoint: str) -> None:
    data = make_folder(tmp_path / "photos", {"a": 50, "b": 50, "c": 50})
    assert planned(data, checkpoint, train__batch_size=4) == (135, 15, 5 * 33)
    assert planned(data, checkpoint, train__batch_size=8) == (135, 15, 7 * 16)  # a hundred steps or more
    assert planned(data, checkpoint, train__batch_size=64) == (135, 15, 50 * 2)
    assert planned(data, checkpoint, data__holdout=0.5, finetune__epochs=2) == (75, 75, 2)
    assert planned(data, checkpoint, train__batch_size=1000, finetune__epochs=1) == (135, 15, 1)
    assert planned(data, checkpoint, data__max_train=9, finetune__epochs=3) == (9, 15, 3)


def test_a_folder_of_a_training_split_alone(tmp_path: Path, checkpoint: str) -> None:
    data = make_folder(tmp_path / "photos" / "train", {"a": 10, "b": 10, "c": 10}).parent
    (data / "labels.txt").write_text("a b c")
    assert planned(data, checkpoint) == (27, 3, 50)
    shutil.copytree(data / "train", data / "test")  # which could be meant for validation
    with pytest.raises(NestifyError, match=r"it holds .*test/.*--val-split"):
        planned(data, checkpoint)
    with pytest.raises(NestifyError, match="no split 'vall'"):
        planned(data, checkpoint, data__val_split="vall")


def test_classes_that_fit_keep_their_classifier(tmp_path: Path) -> None:
    checkpoint = save_network(tmp_path / "four.safetensors", 4)
    data = make_folder(tmp_path / "photos", dict.fromkeys("abcd", 2))
    assert planned(data, checkpoint) == (4, 4, 0)
    with pytest.raises(NestifyError, match="--finetune-epochs"):
        planned(data, checkpoint, finetune__save=str(tmp_path / "dense.safetensors"))


def test_a_classifier_that_is_to_be_kept(tmp_path: Path, checkpoint: str) -> None:
    data = make_folder(tmp_path / "photos", {"a": 2, "b": 2})
    with pytest.raises(NestifyError, match=r"predicts 7 classes .*--keep-head"):
        planned(data, checkpoint, model__new_head=False)


def test_the_backbone_is_that_of_the_checkpoint(tmp_path: Path, checkpoint: str) -> None:
    data = make_folder(tmp_path / "photos", {"a": 10, "b": 10, "c": 10})
    saved = str(tmp_path / "dense.safetensors")
    options = {"finetune.save": saved, "finetune.epochs": 1, "finetune.lr": 1e-30}
    run(data, checkpoint, str(tmp_path / "open" / "x.safetensors"), options)
    before, after = load_file(checkpoint), load_file(saved)
    same = {name for name, old in before.items() if old.dim() == 4 and torch.equal(old, after[name])}
    assert same == {name for name, old in before.items() if old.dim() == 4}
    assert after["fc.weight"].shape == (3, 16)


@pytest.mark.parametrize(("epochs", "ramp"), [(599, 0.0), (600, 0.5)])
def test_short_runs_start_at_their_sparsities(
    tmp_path: Path, checkpoint: str, epochs: int, ramp: float
) -> None:
    """A step per epoch: three images in one batch."""
    data = make_folder(tmp_path / "photos", {"a": 2, "b": 2, "c": 2})
    options = {
        **KWARGS,
        "data.path": str(data),
        "data.holdout": 0.5,
        "train.batch_size": 3,
        "model.checkpoint": checkpoint,
        "levels": "0.5,0",
        "train.epochs": epochs,
    }
    found = plan("test_resnet", options, observer=Observer())
    assert (found.steps, found.ramp) == (epochs, ramp)
    assert plan("test_resnet", {**options, "schedule.ramp": 0.25}, observer=Observer()).ramp == 0.25


def test_the_chosen_ramp_is_stored(tmp_path: Path, checkpoint: str) -> None:
    data = make_folder(tmp_path / "photos", {"a": 10, "b": 10, "c": 10})
    options = {"train.epochs": 1, "data.holdout": 0.1, "train.batch_size": 9, "finetune.epochs": 1}
    chosen, recipe, _ = run(data, checkpoint, str(tmp_path / "open" / "x.safetensors"), options)
    given, _, _ = run(
        data, checkpoint, str(tmp_path / "given" / "x.safetensors"), {**options, "schedule.ramp": 0}
    )
    assert recipe["schedule"]["ramp"] == 0  # type: ignore[index]
    assert chosen == given


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [("sgd", 0.01), ("momentum", 0.01), ("adamw", 0.0005), ("LION", 0.0005), ("lookahead_adam", 0.0005)],
)
def test_the_usual_rate_depends_on_the_optimizer(optimizer: str, rate: float) -> None:
    """A rate for SGD would destroy the weights in AdamW's first steps."""
    recipe = load_recipe("digits", {"train.opt": optimizer, "finetune.lr": 0.3})
    assert (recipe.train.lr, recipe.finetune.lr) == (None, 0.3)
    found = with_usual_rates(recipe)
    assert (found.train.lr, found.finetune.lr) == (rate, 0.3)
    assert with_usual_rates(found) == found


def test_a_lowest_rate_above_the_usual_one_is_refused() -> None:
    recipe = load_recipe("digits", {"train.opt": "adamw", "train.min_lr": 0.001})
    with pytest.raises(RecipeError, match=r"0\.001 is above the default learning rate of adamw, 0\.0005"):
        with_usual_rates(recipe)
    searched = load_recipe("digits", {"train.opt": "adamw", "train.min_lr": 0.001, "train.lr": "auto"})
    with pytest.raises(RecipeError, match="above the default learning rate"):  # a search may find none
        with_usual_rates(searched)
    assert with_usual_rates(load_recipe("digits", {"train.min_lr": 0.001})).train.lr == 0.01


def test_a_file_holds_the_rate_that_was_used(tmp_path: Path) -> None:
    output = tmp_path / "a.nested.safetensors"
    few = {"train.opt": "adamw", "train.epochs": 0.1, "data.max_train": 64, "data.max_val": 10}
    compress("digits", {**few, "train.eval_before": False, "output": str(output)}, observer=Observer())
    assert open_nested_file(output).manifest.recipe["train"]["lr"] == 0.0005


def test_a_plan_shows_the_rates_of_what_is_trained(checkpoint: str, tmp_path: Path) -> None:
    shown = []
    for options in ({"train.opt": "adamw"}, {"train.lr": "auto", "finetune.epochs": 1}, {"train.epochs": 0}):
        planned = plan("digits", {"data.max_train": 64, "data.max_val": 10, **options}, observer=Observer())
        shown.append(dict(planned.rates))
        assert str(planned).count("learning rate: 0.0") == len(planned.rates)
    assert shown == [{"train": 0.0005}, {"finetune": 0.01, "train": 0.01}, {}]
