"""Runs with weights of classes."""

from pathlib import Path
from typing import Any

import pytest

from nestify.recipe.augment_options import AugmentOptions
from nestify.recipe.options import TrainOptions
from nestify.training.losses import label_loss

from .driver import nestify


def test_a_run_counts_the_images_of_each_class(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def watch(options: TrainOptions, augment: AugmentOptions, counts: Any) -> Any:
        seen.append((options.loss, counts))
        return label_loss(options, augment, counts)

    monkeypatch.setattr("nestify.training.phases.label_loss", watch)
    for place, path in enumerate(sorted((images / "train" / "3").iterdir())):
        if place >= 5:
            path.unlink()
    few = ("--epochs", "0.1", "--batch-size", "32", "--set", "train.eval_before=false")
    weighted = ("--set", "train.class_weights=balanced", "--set", "train.loss=bce")
    done = nestify("compress", "digits", "--data", images, *few, *weighted, "-o", tmp_path / "a.safetensors")
    assert done.code == 0, done.err
    assert seen[-1] == ("bce", [20, 20, 20, 5, 20, 20, 20, 20, 20, 20])
