"""Checkpoints that are missing, damaged, dangerous, or do not fit the model."""

import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Refused
from tests.cli.driver import CHECKPOINT, QUICK, TWO_STEPS, nestify

START = ("compress", "digits", *QUICK, "--checkpoint")


class Bomb:
    """An object that creates a file if it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch exploded",)


def cut_in_half(source: Path, target: Path) -> Path:
    content = source.read_bytes()
    target.write_bytes(content[: len(content) // 2])
    return target


def test_missing(refused: Refused) -> None:
    assert refused(3, *START, "nowhere.safetensors").startswith(
        "checkpoint nowhere.safetensors is not a file;"
    )


def test_an_unknown_suffix(refused: Refused) -> None:
    assert 'model.checkpoint = "weights.h5" is not a checkpoint' in refused(2, *START, "weights.h5")


def test_cut_safetensors(refused: Refused, tmp_path: Path) -> None:
    message = refused(3, *START, cut_in_half(CHECKPOINT, tmp_path / "cut.safetensors"))
    assert message.startswith(f"checkpoint {tmp_path}/cut.safetensors cannot be read (")
    assert "copy it again, or save only its state_dict" in message


def test_pth(tmp_path: Path) -> None:
    torch.save(load_file(CHECKPOINT), tmp_path / "whole.pth")
    assert nestify(*START, "whole.pth", "--dry-run").code == 0


def test_cut_pth(refused: Refused, tmp_path: Path) -> None:
    torch.save(load_file(CHECKPOINT), tmp_path / "whole.pth")
    assert "cut.pth cannot be read (" in refused(3, *START, cut_in_half(Path("whole.pth"), Path("cut.pth")))


@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(256)) * 8])
@pytest.mark.parametrize("name", ["bad.safetensors", "bad.pth"])
def test_a_file_that_is_not_a_checkpoint(content: bytes, name: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert refused(3, *START, name).startswith(f"checkpoint {name} cannot be read (")


def test_pickled_objects_are_not_run(refused: Refused, tmp_path: Path) -> None:
    torch.save({"state_dict": load_file(CHECKPOINT), "optimizer": Bomb()}, tmp_path / "bomb.pth")
    Path("legacy.pth").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    for name in ("bomb.pth", "legacy.pth"):
        assert "contain more than weights" in refused(3, *START, name)
    assert not Path("exploded").exists()


def test_no_tensors(refused: Refused, tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    assert refused(3, *START, "empty.pth").startswith("checkpoint empty.pth contains no tensors;")


def test_values_that_are_not_finite(refused: Refused) -> None:
    weights = load_file(CHECKPOINT)
    weights["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, "nan.safetensors")
    message = refused(3, *START, "nan.safetensors")
    assert message.startswith("checkpoint nan.safetensors: layer1.0.conv1.weight ")
    assert "not finite; give a checkpoint" in message


def test_another_architecture(refused: Refused) -> None:
    save_file(timm.create_model("test_vit", num_classes=10).state_dict(), "vit.safetensors")
    message = refused(3, *START, "vit.safetensors")
    assert message.startswith("checkpoint vit.safetensors does not fit test_resnet: ")
    assert "keys are missing (conv1.0.weight, " in message
    assert "keys are unknown (blocks." in message


@pytest.mark.parametrize(("name", "head"), [("test_resnet", "fc"), ("test_vit", "head")])
def test_a_checkpoint_without_a_classifier(name: str, head: str, refused: Refused) -> None:
    """Only where nothing else is missing does a new classifier help."""
    weights = timm.create_model(name, num_classes=10).state_dict()
    words = (*START, "headless.safetensors", "--set", f"model.name={name}", "--set", "model.input_size=160")
    del weights[f"{head}.weight"], weights[f"{head}.bias"]
    save_file(weights, "headless.safetensors")
    message = refused(3, *words)
    assert f"2 keys are missing ({head}.weight, {head}.bias); it lacks the classifier alone" in message
    assert "--new-head" in message
    assert nestify(*words, "--new-head", "--dry-run").code == 0
    del weights[next(iter(weights))]
    save_file(weights, "headless.safetensors")
    assert "--new-head" not in refused(3, *words)


def test_a_layer_of_another_shape(refused: Refused) -> None:
    weights = load_file(CHECKPOINT)
    weights["conv1.0.weight"] = weights["conv1.0.weight"][:, :1].contiguous()
    save_file(weights, "grey.safetensors")
    assert "1 shapes differ (conv1.0.weight is (16, 1, 3, 3), not (16, 3, 3, 3))" in refused(
        3, *START, "grey.safetensors"
    )


def test_another_number_of_classes(refused: Refused) -> None:
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), "seven.safetensors")
    message = refused(3, *START, "seven.safetensors", "--keep-head")
    assert message.startswith("seven.safetensors predicts 7 classes (fc.weight), ")
    assert " has 10; " in message
    assert "leave out --keep-head" in message
    assert nestify(*START, "seven.safetensors", "--dry-run").code == 0


def test_bad_teachers(refused: Refused) -> None:
    words = ("compress", "digits", "--epochs", "1", "--teacher")
    message = refused(2, *words, "test_resnett")
    assert message.startswith("train.teacher = 'test_resnett' is not a model of timm")
    assert "similar names are test_resnet" in message
    checkpoint = ("--set", "train.teacher_checkpoint=nowhere.pth")
    assert refused(3, *words, "test_resnet", *checkpoint).startswith("checkpoint nowhere.pth is not a file")
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), "seven.safetensors")
    message = refused(3, *words, "test_resnet", "--set", "train.teacher_checkpoint=seven.safetensors")
    assert message.startswith("train.teacher = 'test_resnet' predicts 7 classes, the model 10;")


def test_a_new_classifier_needs_the_rest_of_the_weights(refused: Refused) -> None:
    weights = load_file(CHECKPOINT)
    weights["layer1.0.conv1.weight_orig"] = weights.pop("layer1.0.conv1.weight")
    save_file(weights, "pruned.safetensors")
    message = refused(3, *START, "pruned.safetensors", "--new-head", "--finetune-epochs", "1")
    assert "1 keys are missing (layer1.0.conv1.weight)" in message
    assert "prune.remove" in message


def test_whole_numbers_are_no_weights(refused: Refused) -> None:
    weights = {key: tensor.to(torch.int8) for key, tensor in load_file(CHECKPOINT).items()}
    save_file(weights, "int8.safetensors")
    assert "is int8, not float32" in refused(3, *START, "int8.safetensors")


def test_float8_is_read(tmp_path: Path) -> None:
    weights = load_file(CHECKPOINT)
    weights["fc.weight"] = weights["fc.weight"].to(torch.float8_e4m3fn)
    save_file(weights, "fp8.safetensors")
    assert nestify(*START, "fp8.safetensors", "--dry-run").code == 0


@pytest.mark.parametrize("as_teacher", [False, True])
def test_changes_on_reading_are_told(as_teacher: bool, tmp_path: Path) -> None:
    weights = load_file(CHECKPOINT)
    weights["fc.weight_orig"] = weights.pop("fc.weight")
    weights["fc.weight_mask"] = torch.ones_like(weights["fc.weight_orig"])
    torch.save({"net": weights, "epoch": 3}, "wrapped.pth")
    words = (*QUICK, "--checkpoint", "wrapped.pth")
    if as_teacher:
        words = (*TWO_STEPS, "--teacher", "test_resnet", "--set", "train.teacher_checkpoint=wrapped.pth")
    told = nestify("compress", "digits", *words, "-o", "x.nested.safetensors")
    assert told.code == 0
    assert "wrapped.pth: using the weights under net" in told.err
    assert "wrapped.pth: 1 pruning masks were applied (fc.weight)" in told.err


@pytest.mark.parametrize(
    "kwargs", ["drop_rate=1e308", 'block="x"', "global_pool=true", "block_reduce_first=0", 'device="meta"']
)
def test_arguments_that_no_model_takes(kwargs: str, refused: Refused) -> None:
    refused(3, *START, CHECKPOINT, "--set", f"model.kwargs.{kwargs}")
