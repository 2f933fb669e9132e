"""Nested models that are trained in a loop of the user's own."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional

import nestify
from nestify.compression.inputs import augmentation, open_recipe_images
from nestify.compression.trainable import TrainableNestedModel
from nestify.data.loaders import train_loader
from nestify.errors import BudgetError, NestifyError, RecipeError
from tests.cli.driver import CHECKPOINT

Make = Callable[..., nn.Module]

SETTINGS = {
    "train.epochs": 2,
    "train.batch_size": 32,
    "train.lr": 0.02,
    "train.sched": "constant",
    "train.eval_before": False,
    "train.recalibrate_batches": 2,
    "data.max_train": 96,
    "data.max_val": 20,
}
STEPS = 6
SHAPE = (3, 32, 32)


def digits_model() -> nn.Module:
    """The model of the recipe `digits` with its weights."""
    model: nn.Module = timm.create_model("test_resnet", num_classes=10, checkpoint_path=CHECKPOINT)
    return model


def digits_batches(recipe: nestify.Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that `compress` trains on."""
    images, _ = open_recipe_images(recipe)
    preprocessing = timm.data.resolve_model_data_config(digits_model(), args={"input_size": SHAPE})
    preprocessing["exif_orientation"] = recipe.data.exif_orientation
    loader = train_loader(
        images,
        preprocessing,
        batch_size=32,
        min_images=2,
        workers=0,
        augment=augmentation(recipe),
        seed=recipe.seed,
        device=torch.device("cpu"),
    )
    for epoch in range(2):
        yield from loader.epoch(epoch)


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    mine, yours = one.state_dict(), other.state_dict()
    return mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)


@pytest.mark.parametrize(
    ("schedule", "levels", "more"),
    [
        ("weight", "0.9,0.5,0", {"schedule.ramp": 0.5, "train.teacher": "original"}),
        ("weight", "macs=0.4,1", {"schedule.ramp": 0.5, "train.teacher": "none"}),
        ("channel", "0.25,0.5,1", {"train.teacher": "self"}),
    ],
)
def test_the_same_weights_as_compress(
    tmp_path: Path, schedule: Any, levels: str, more: Mapping[str, object]
) -> None:
    given = {**SETTINGS, "schedule.kind": schedule, "levels": levels, "data.workers": 0, **more}
    recipe = nestify.load_recipe("digits", {**given, "output": str(tmp_path / "compress.safetensors")})
    nestify.compress(recipe, observer=nestify.Observer())

    teachers: dict[str, Any] = {"original": digits_model().eval(), "self": "self", "none": None}
    nested = nestify.nest(
        digits_model(),
        levels,
        schedule,
        options={"train.distill": 0.5, "train.recalibrate_batches": 2},
        ramp_steps=round(STEPS * more.get("schedule.ramp", 0)),  # type: ignore[operator]
        teacher=teachers[str(more["train.teacher"])],
        images=None if schedule == "weight" else _calibration(recipe),
        input_size=SHAPE,
    )
    optimizer = create_optimizer_v2(nested, "sgd", lr=0.02, weight_decay=1e-4, momentum=0.9)
    for step, (images, target) in enumerate(digits_batches(recipe)):
        nested.update(step)
        optimizer.zero_grad()
        nested.backward(images, target)
        optimizer.step()
    nested.update(STEPS)
    nested.save(tmp_path / "own.safetensors")

    assert same_tensors(nestify.load(tmp_path / "compress.safetensors"), nestify.load(tmp_path / "own.safetensors"))
