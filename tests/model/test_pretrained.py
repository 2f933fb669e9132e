"""Checkpoints are loaded without changes, or refused with the reason."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nestify.errors import CheckpointError, RecipeError
from nestify.model.pretrained import load_pretrained, save_plain

MakeModel = Callable[..., nn.Module]


@pytest.fixture
def checkpoint(tmp_path: Path, make_model: MakeModel) -> Path:
    path = tmp_path / "resnet.safetensors"
    save_file(make_model("test_resnet").state_dict(), path)
    return path


def test_checkpoint_gives_its_weights_and_classes(checkpoint: Path) -> None:
    loaded = load_pretrained("test_resnet", checkpoint=checkpoint)
    plain = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(checkpoint)).eval()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded.model(image), plain(image))
    assert loaded.spec.num_classes == 10
    assert not loaded.new_head
    assert loaded.source_sha256 is not None
    assert "state_dict" not in loaded.model.pretrained_cfg


@pytest.mark.parametrize(
    ("name", "side"),
    [("test_resnet", 64), ("test_convnext", 64), ("test_efficientnet", 64), ("test_vit", 160)],
    ids=str,
)
def test_feature_maps_have_the_weights_of_a_checkpoint_with_a_classifier(
    name: str, side: int, tmp_path: Path, make_model: MakeModel
) -> None:
    """timm gives some of these backbones other names of tensors, and leaves the last layers out."""
    classifier = make_model(name).eval()
    save_file(classifier.state_dict(), tmp_path / "classifier.safetensors")
    kwargs = {"features_only": True}
    loaded = load_pretrained(name, checkpoint=tmp_path / "classifier.safetensors", kwargs=kwargs)
    image = torch.randn(1, 3, side, side)
    with torch.no_grad():
        wanted = classifier.forward_intermediates(image, intermediates_only=True)
        maps = loaded.model(image)
    for own, other in zip(maps, wanted[-len(maps) :], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    deeper = {"test_resnet": {"layers": [2, 1, 1, 1]}, "test_vit": {"depth": 7}}.get(name)
    if deeper is not None:
        with pytest.raises(CheckpointError, match="missing"):
            load_pretrained(name, checkpoint=tmp_path / "classifier.safetensors", kwargs={**kwargs, **deeper})


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
def test_pth_with_weights_only(
    wrap: Callable[[object], object], tmp_path: Path, make_model: MakeModel
) -> None:
    model = make_model("test_resnet").eval()
    path = tmp_path / "resnet.pth"
    torch.save(wrap(model.state_dict()), path)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_pretrained("test_resnet", checkpoint=path).model(image), model(image))


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    torch.save({"state_dict": Bomb(trace)}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match=r"bomb.pth cannot be read .* more than weights"):
        load_pretrained("test_resnet", checkpoint=tmp_path / "bomb.pth")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth", "text.pth", "empty.safetensors"])
def test_damaged_checkpoints_are_refused(name: str, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "cut.pth":
        torch.save(torch.randn(1000), path)
        path.write_bytes(path.read_bytes()[:2000])
    elif name == "cut.safetensors":
        path.write_bytes(checkpoint.read_bytes()[:-100])
    else:
        path.write_bytes(b"" if name.startswith("empty") else b"no checkpoint at all\n")
    with pytest.raises(CheckpointError, match=f"checkpoint .*{name} cannot be read"):
        load_pretrained("test_resnet", checkpoint=path)


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.pth is not a file"):
        load_pretrained("test_resnet", checkpoint=tmp_path / "nowhere.pth")


def test_checkpoint_of_another_architecture_names_keys(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained("test_efficientnet", checkpoint=checkpoint)
    message = str(caught.value)
    assert "does not fit test_efficientnet" in message
    assert "keys are missing (conv_stem.weight, " in message
    assert "keys are unknown (" in message
    assert "shapes differ (bn1.weight is (" in message
    with pytest.raises(CheckpointError, match="keys are missing"):
        load_pretrained("test_efficientnet", checkpoint=checkpoint, new_head_classes=10)


@pytest.mark.parametrize("classes", [3, 10])
def test_new_head_is_initialised_and_the_rest_is_the_checkpoints(classes: int, checkpoint: Path) -> None:
    old = load_pretrained("test_resnet", checkpoint=checkpoint).model.state_dict()
    loaded = load_pretrained("test_resnet", checkpoint=checkpoint, new_head_classes=classes)
    assert loaded.new_head
    assert loaded.spec.num_classes == classes
    for key, tensor in loaded.model.state_dict().items():
        if key == "fc.weight":
            assert tensor.shape[0] == classes
            assert not torch.equal(tensor, old[key])
        elif not key.startswith("fc."):
            assert torch.equal(tensor, old[key])


def test_input_size_is_passed_to_models_that_fix_it() -> None:
    vit = load_pretrained("test_vit", pretrained=False, input_size=64)
    assert vit.spec.input_size == (3, 64, 64)
    assert vit.model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    resnet = load_pretrained("test_resnet", pretrained=False, input_size=(48, 64))
    assert resnet.spec.input_size == (3, 48, 64)
    assert "img_size" not in resnet.spec.kwargs


def test_unknown_model_is_refused_with_similar_names() -> None:
    with pytest.raises(RecipeError, match=r"model.name = 'resnet18x' is not a model of timm .* resnet18"):
        load_pretrained("resnet18x", pretrained=False)


def test_values_that_only_a_checkpoint_makes_finite_are_refused() -> None:
    small = {"embed_dim": 16, "depth": 1, "num_heads": 1, "head_dim": 16, "intermediate_size": 16}
    with pytest.raises(CheckpointError, match=r"input_min .*not finite; set model.checkpoint to a file"):
        load_pretrained("gemma4_vit_167m", pretrained=False, kwargs=small)


def test_a_model_in_channels_last_is_saved(tmp_path: Path, make_model: MakeModel) -> None:
    model = make_model("test_resnet").to(memory_format=torch.channels_last)
    save_plain(model, tmp_path / "dense.safetensors")
    saved = load_file(tmp_path / "dense.safetensors")
    assert saved.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=0)
