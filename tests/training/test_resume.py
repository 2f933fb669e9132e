"""A run that is cut off at any step goes on to the same bytes; one that is not the same is refused."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestify import api
from nestify.errors import CheckpointError, DataError, RecipeError
from nestify.training.observer import Observer
from nestify.training.resume import checkpoint_path
from nestify.training.stepper import Stepper

FINETUNE_STEPS, STEPS = 3, 9  # of 3 batches an epoch, the last epoch cut
SMALL: Mapping[str, object] = {
    "data.max_train": 48,
    "data.max_val": 20,
    "train.batch_size": 16,
    "train.epochs": 2.6,
    "train.recalibrate_batches": 1,
    "finetune.epochs": 1,
    "levels": "0.9,0.5,0",
}
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "ramp to the end": {"schedule.ramp": 1.0},
    "budgets": {"levels": "macs=0.4,1", "train.eval_before": False},
    "channels": {"schedule.kind": "channel", "levels": "0.5,1", "finetune.epochs": 0},
    "averaged": {"train.ema_decay": 0.9, "train.opt": "adamw", "train.clip_grad": 1.0},
    "chances": {
        "levels": "0.9,0.7,0.5,0",
        "train.sandwich": 2,
        "augment.mixup": 0.2,
        "model.kwargs.drop_rate": 0.3,
        "train.teacher": "both",
    },
    "recalibrated, channels last": {"train.bn": "recalibrate", "train.channels_last": True, "train.opt": "lamb"},
}


class Cut(Exception):
    """Ends a run at a step."""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(name: str, options: Mapping[str, object], **more: object) -> bytes:
    """The bytes of the nested file of a run."""
    output = Path(f"{name}.nested.safetensors")
    api.compress("digits", {**SMALL, **options, "output": str(output)}, **more)  # type: ignore[arg-type]
    assert not checkpoint_path(output).exists()
    return output.read_bytes()


def cut_at(step: int, options: Mapping[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a run of the name "cut" and end it after so many steps, fine-tuning included."""
    take, done = Stepper.take, 0

    def counted(self: Stepper, images: Tensor, target: Tensor) -> None:
        nonlocal done
        if done == step:
            raise Cut
        take(self, images, target)
        done += 1

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Stepper, "take", counted)
        run("cut", options)


def same_name(whole: bytes, name: str) -> bytes:
    """A file's bytes, were it written under another name of the same length."""
    return whole.replace(b"all.nested", name.encode() + b".nested")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_is_cut_off_goes_on_to_the_same_bytes(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = VARIANTS[variant]
    whole = same_name(run("all", options), "cut")
    finetune = FINETUNE_STEPS * int(options.get("finetune.epochs", 1))  # type: ignore[call-overload]
    for step in sorted({1, finetune, finetune + 1, finetune + 4, finetune + 5, finetune + STEPS - 1} - {0}):
        cut_at(step, options, monkeypatch)
        assert checkpoint_path(Path("cut")).exists()
        assert run("cut", options, resume=True) == whole, step
