"""Effects of the options of `nestify compress`, checked on the file that it writes."""

import json
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nestify import load
from tests.cli.driver import CHECKPOINT, TWO_STEPS, UNTRAINED, events, nestify, stored_recipe

FEW = ("--max-train", "32", "--max-val", "10")
OUTPUT = Path("out.safetensors")
BATCHES = ("--epochs", "1", "--batch-size", "16", *FEW)
LOG = Path("out.metrics.jsonl")


def compressed(*words: str | Path) -> list[dict[str, Any]]:
    """Return the levels of a run without training."""
    done = nestify("compress", "digits", *UNTRAINED, *FEW, "-o", OUTPUT, "--json", *words)
    assert done.code == 0, done.err
    levels: list[dict[str, Any]] = done.document["levels"]
    return levels


def losses(*words: str | Path) -> list[float]:
    """Return the training losses of a run of two steps, by level."""
    done = nestify("compress", "digits", *TWO_STEPS, *BATCHES, "-o", OUTPUT, *words)
    assert done.code == 0, done.err
    [trained] = events(LOG, "train")
    result: list[float] = trained["losses"]
    return result


def weights(level: int) -> dict[str, Tensor]:
    return dict(load(OUTPUT).at_level(level).state_dict())


# Levels


def test_n_of_m_levels() -> None:
    levels = compressed("--levels", "1:4,2:4,0")
    assert [level["pattern"] for level in levels] == ["1:4", "2:4", "unstructured"]
    for level, kept in zip(levels, (1, 2, 4), strict=True):
        for layer in level["layers"]:
            three_channels = (
                layer["name"] == "conv1.0.weight"
            )  # 4 does not divide them: the layer stays dense
            assert layer["kept"] * 4 == layer["weights"] * (4 if three_channels else kept), layer
    groups = weights(1)["layer1.0.conv1.weight"].unfold(1, 4, 4)  # (out, in / 4, kh, kw, 4)
    assert (groups != 0).sum(-1).max() == 1


def test_blocks() -> None:
    levels = compressed("--pattern", "8x1")
    assert [level["pattern"] for level in levels] == ["8x1", "8x1", "unstructured"]
    for level in (1, 2):
        weight = weights(level)["layer1.0.conv1.weight"]
        blocks = (weight != 0).unflatten(0, (-1, 8))  # (out / 8, 8, in, kh, kw)
        assert torch.equal(blocks.any(1), blocks.all(1))
        assert not blocks.all()


@pytest.mark.long
def test_skipped_layers_are_not_masked() -> None:
    first, classifier = "conv1.0.weight", "fc.weight"
    assert {first, classifier} <= {layer["name"] for layer in compressed()[0]["layers"]}
    levels = compressed("--skip", "first", "--skip", "classifier")
    assert not {first, classifier} & {layer["name"] for layer in levels[0]["layers"]}
    pretrained = load_file(CHECKPOINT)
    core = weights(1)
    assert torch.equal(core[first], pretrained[first])
    assert torch.equal(core[classifier], pretrained[classifier])


@pytest.mark.long
def test_scores_distribute_the_weights_differently() -> None:
    shares = {}
    for score in ("fisher", "lamp", "magnitude", "per_mac", "uniform", "erk"):
        core = compressed("--score", score, "--levels", "0.95,0", *FEW)[0]
        shares[score] = tuple(layer["kept"] for layer in core["layers"])
        assert core["sparsity"] == pytest.approx(0.95, abs=1e-3)
        assert stored_recipe(OUTPUT)["schedule"]["score"] == score
        if score == "uniform":
            for layer in core["layers"]:
                assert layer["kept"] == pytest.approx(0.05 * layer["weights"], abs=1)
        if score == "magnitude":
            pretrained = load_file(CHECKPOINT)
            kept = torch.cat(
                [tensor[tensor != 0] for name, tensor in weights(1).items() if name in _masked(core)]
            )
            everything = torch.cat([pretrained[name].flatten() for name in _masked(core)])
            assert kept.abs().min() >= everything.abs().topk(len(kept)).values[-1]
    assert len(set(shares.values())) == 6


def _masked(level: dict[str, Any]) -> set[str]:
    return {layer["name"] for layer in level["layers"]}


def test_two_levels_with_names() -> None:
    words = ["--levels", "0.9,0.5", "--set", "level[1].name=small", "--set", "level[2].name=half"]
    levels = compressed(*words)
    assert [(level["name"], round(level["sparsity"], 3)) for level in levels] == [
        ("small", 0.9),
        ("half", 0.5),
    ]


@pytest.mark.long
def test_a_step_trains_some_of_five_levels() -> None:
    words = ["--levels", "0.95,0.9,0.8,0.5,0"]
    of_all = losses(*words, "--set", "train.sandwich=5")
    of_two = losses(*words, "--set", "train.sandwich=2")
    assert all(loss is not None for loss in of_all)
    assert [loss is None for loss in of_two] == [False, True, True, True, False]
    assert [loss is None for loss in losses(*words)].count(False) >= 4


def test_a_level_that_was_not_trained_yet_is_a_dash() -> None:
    done = nestify("compress", "digits", *TWO_STEPS, "--levels", "0.9,0.5,0", "--set", "train.sandwich=2")
    [line] = [line for line in done.err.splitlines() if line.startswith("train epoch 1")]
    assert " / - / " in line
    assert "nan" not in line


# Training


def test_a_fraction_of_an_epoch_is_rounded_up_to_steps() -> None:
    words = ("compress", "digits", "--max-train", "200", "--batch-size", "32", "--dry-run", "--json")
    for epochs in (0, 0.3, 1.5):
        assert nestify(*words, "--epochs", str(epochs)).document["steps"] == ceil(epochs * 6), epochs


@pytest.mark.long  # compression/test_untrained.py has the same
def test_without_fit_and_training_the_weights_are_the_pretrained_ones() -> None:
    compressed("--set", "schedule.fit=false")
    pretrained = load_file(CHECKPOINT)
    for name, tensor in weights(3).items():
        assert torch.equal(tensor, pretrained[name]), name


def test_batch_norm_private_or_recalibrated() -> None:
    name = "layer1.0.bn1.weight"
    for mode, is_shared in (("private", False), ("recalibrate", True)):
        losses("--bn", mode, "--lr", "0.1")
        core, full = weights(1)[name], weights(3)[name]
        assert torch.equal(core, full) == is_shared, mode
        statistics = name.replace("weight", "running_mean")
        assert not torch.equal(weights(1)[statistics], weights(3)[statistics]), mode


@pytest.mark.long
def test_teachers() -> None:
    by_teacher = {teacher: losses("--teacher", teacher) for teacher in ("original", "self", "both", "none")}
    assert len({tuple(each) for each in by_teacher.values()}) == 4
    assert stored_recipe(OUTPUT)["train"]["teacher"] == "none"
    # another model with the same weights teaches the same
    other = losses("--teacher", "test_resnet", "--set", f"train.teacher_checkpoint={CHECKPOINT}")
    assert other == by_teacher["original"]


@pytest.mark.long
def test_averaged_weights() -> None:
    losses()
    plain = weights(3)
    losses("--set", "train.ema_decay=0.9")
    averaged = weights(3)
    start = load_file(CHECKPOINT)
    name = "layer4.0.conv1.weight"
    moved = [(tensors[name] - start[name]).norm() for tensors in (averaged, plain)]
    assert 0 < moved[0] < moved[1]


@pytest.mark.long  # the next test mixes, too
def test_mixup_and_smoothing() -> None:
    mixed = losses(
        "--set", "augment.mixup=0.2", "--set", "augment.cutmix=1.0", "--set", "augment.smoothing=0.1"
    )
    assert mixed[-1] > losses()[-1]


def test_mixup_of_odd_batches() -> None:
    """An odd batch is not mixed, and the trial step of a plan accepts soft targets too."""
    mixed = ("--set", "augment.mixup=0.2", "--batch-size", "5", "--max-train", "20", "--max-val", "10")
    mixed += ("--set", "train.eval_before=false", "--set", "train.recalibrate_batches=1")
    assert nestify("compress", "digits", *mixed, "--dry-run").code == 0
    assert nestify("compress", "digits", *mixed, "--epochs", "0.3").code == 0


def test_a_fresh_classifier() -> None:
    words = ("--new-head", "--finetune-epochs", "1", "--set", "finetune.save=dense.safetensors")
    compressed(*words, "--checkpoint", CHECKPOINT, "--max-train", "200")
    assert events(LOG, "finetune")[0]["total_steps"] == 200 // 64
    fresh, old = load_file("dense.safetensors"), load_file(CHECKPOINT)
    assert not torch.equal(fresh["fc.weight"], old["fc.weight"])
    assert torch.equal(weights(3)["fc.weight"], fresh["fc.weight"])


def test_settings() -> None:
    """Values are TOML values or bare words; a later setting overrides an earlier one."""
    stored = {
        "train.opt=sgd": "adamw",
        "train.clip_grad = 2": 2.0,
        "train.eval_before=true": True,
        "train.opt=adamw": "adamw",
        'model.kwargs.act_layer="gelu"': "gelu",
        "train.sandwich=none": None,
        "model.input_size=[32, 32]": [32, 32],
        "schedule.skip=['fc']": ["fc"],
        "augment.ratio=[0.5, 2]": [0.5, 2.0],
        "model.kwargs.drop_rate=0.25": 0.25,
        "level[2].weight=3": 3.0,
    }
    compressed(*(word for setting in stored for word in ("--set", setting)))
    for setting, value in stored.items():
        found: Any = stored_recipe(OUTPUT)
        for part in setting.partition("=")[0].strip().replace("[2]", ".1").split("."):
            found = found[int(part) if part.isdigit() else part]
        assert json.dumps(found) == json.dumps(value), setting
