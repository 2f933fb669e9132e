"""A checkpoint fills the whole model, apart from a new classifier, or is refused by key."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from nestify.errors import CheckpointError
from nestify.model.pretrained import load_pretrained

Change = Callable[[dict[str, Tensor]], object]
NEW_HEAD = pytest.mark.parametrize("new_head_classes", [None, 3, 10])
CONV = "layer2.0.conv1.weight"
SMALL_FASTVIT = {
    "layers": [1, 1, 1, 1],
    "embed_dims": [8, 8, 16, 16],
    "mlp_ratios": [1, 1, 1, 1],
    "inference_mode": True,
}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Return the state dict of a test_resnet of 10 classes, with statistics of batch norm."""
    model = timm.create_model("test_resnet", num_classes=10)
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32))
    return model.state_dict()


def saved(state: dict[str, Tensor], path: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return path


@NEW_HEAD
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop(CONV), f"1 keys are missing ({CONV})"),
        (lambda s: s.pop("bn1.running_var"), "1 keys are missing (bn1.running_var)"),
        (lambda s: s.update(extra=torch.ones(2)), "1 keys are unknown (extra)"),
        (lambda s: s.update({CONV + "_orig": s.pop(CONV)}), f"{CONV}_orig is left over"),
        (lambda s: s.update({CONV: s[CONV][:, :1]}), f"1 shapes differ ({CONV} is"),
        (lambda s: s.update({CONV: s[CONV].to(torch.int8)}), f"({CONV} is int8, not float32)"),
        (lambda s: s.update({"bn1.bias": s["bn1.bias"].long()}), "(bn1.bias is int64, not float32)"),
        (lambda s: s.update({"bn1.num_batches_tracked": torch.tensor(0.5)}), "is float32, not int64"),
    ],
)
def test_every_difference_is_refused(
    change: Change, named: str, new_head_classes: int | None, state: dict[str, Tensor], tmp_path: Path
) -> None:
    changed = dict(state)
    change(changed)
    path = saved(changed, tmp_path / "changed.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_pretrained("test_resnet", checkpoint=path, new_head_classes=new_head_classes)
    assert str(caught.value).startswith(f"checkpoint {path} does not fit test_resnet: ")
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: [s.pop(key) for key in list(s) if key.endswith("num_batches_tracked")],
        lambda s: s.update({key: t.double() for key, t in s.items()}),
        lambda s: s.update({key: t.float() for key, t in s.items()}),
    ],
)
@NEW_HEAD
def test_differences_without_effect_are_accepted(
    change: Change, new_head_classes: int | None, state: dict[str, Tensor], tmp_path: Path
) -> None:
    changed = dict(state)
    change(changed)
    path = saved(changed, tmp_path / "same.safetensors")
    loaded = load_pretrained("test_resnet", checkpoint=path, new_head_classes=new_head_classes)
    for key, tensor in loaded.model.state_dict().items():
        if not key.endswith("num_batches_tracked") and not (new_head_classes and key.startswith("fc.")):
            assert torch.equal(tensor, state[key])


@NEW_HEAD
def test_deeper_models_than_the_checkpoint_are_refused(
    new_head_classes: int | None, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = saved(state, tmp_path / "shallow.safetensors")
    with pytest.raises(CheckpointError, match=r"keys are missing \(layer1.1.conv1.weight, "):
        load_pretrained(
            "test_resnet",
            checkpoint=path,
            kwargs={"layers": [2, 2, 2, 2]},
            new_head_classes=new_head_classes,
        )


@pytest.mark.filterwarnings("ignore")  # the older functions are deprecated
@NEW_HEAD
@pytest.mark.parametrize(
    "parametrise", [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_parametrised_weights_are_refused_by_name(
    parametrise: Callable[[nn.Module], nn.Module], new_head_classes: int | None, tmp_path: Path
) -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    parametrise(model.layer2[0].conv1)
    path = saved(model.state_dict(), tmp_path / "parametrised.safetensors")
    with pytest.raises(CheckpointError, match=r"layer2.0.conv1.\S+ is left over .*remove_parametrizations"):
        load_pretrained("test_resnet", checkpoint=path, new_head_classes=new_head_classes)


def test_a_new_classifier_may_replace_one_of_several_layers(state: dict[str, Tensor], tmp_path: Path) -> None:
    changed = {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}
    for other in ({}, {"fc.0.weight": torch.ones(5, 5), "fc.2.weight": torch.ones(7, 5)}):
        path = saved(changed | other, tmp_path / "head.safetensors")
        loaded = load_pretrained("test_resnet", checkpoint=path, new_head_classes=3)
        assert loaded.model.fc.weight.shape[0] == 3
        with pytest.raises(CheckpointError, match=r"2 keys are missing \(fc.weight, fc.bias\)"):
            load_pretrained("test_resnet", checkpoint=path)


def test_architectures_that_timm_loads_without_checks_are_checked(tmp_path: Path) -> None:
    small = {"channels": [8, 8, 16, 16, 16, 16], "levels": [1, 1, 1, 1, 1, 1]}
    state = timm.create_model("dla34", num_classes=3, **small).state_dict()
    assert load_pretrained("dla34", checkpoint=saved(state, tmp_path / "dla.safetensors"), kwargs=small)
    del state["base_layer.0.weight"]
    path = saved(state, tmp_path / "random.safetensors")
    with pytest.raises(CheckpointError, match=r"1 keys are missing \(base_layer.0.weight\)"):
        load_pretrained("dla34", checkpoint=path, kwargs=small)


@pytest.mark.parametrize("new_head_classes", [None, 5])
def test_weights_that_timm_would_convert_wrongly_are_loaded_as_they_are(
    new_head_classes: int | None, tmp_path: Path
) -> None:
    model = timm.create_model("fastvit_t8", num_classes=3, **SMALL_FASTVIT).eval()
    path = saved(model.state_dict(), tmp_path / "deploy.safetensors")
    loaded = load_pretrained(
        "fastvit_t8", checkpoint=path, kwargs=SMALL_FASTVIT, new_head_classes=new_head_classes, input_size=64
    )
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.model.forward_features(image), model.forward_features(image))


@pytest.mark.parametrize("new_head_classes", [None, 5])
def test_timms_conversions_still_apply(new_head_classes: int | None, tmp_path: Path) -> None:
    state = timm.create_model("test_vit", num_classes=3).state_dict()
    path = saved(state, tmp_path / "vit.safetensors")
    loaded = load_pretrained(
        "test_vit", checkpoint=path, input_size=64, new_head_classes=new_head_classes
    ).model.state_dict()
    assert loaded["pos_embed"].shape != state["pos_embed"].shape
    assert torch.equal(loaded["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    del state["blocks.0.attn.qkv.weight"]
    path = saved(state, tmp_path / "lacks.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \(blocks.0.attn.qkv.weight\)"):
        load_pretrained("test_vit", checkpoint=path, input_size=64, new_head_classes=new_head_classes)


@pytest.fixture
def folder(state: dict[str, Tensor], tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes weights to a folder as timm's `local-dir:` reads it."""

    def write(*, without: str = "", extra: str = "") -> str:
        given = {key: tensor for key, tensor in state.items() if key != without}
        given |= {extra: torch.ones(2)} if extra else {}
        saved(given, tmp_path / "model.safetensors")
        cfg = {"num_classes": 10, "input_size": [3, 32, 32], "classifier": "fc", "first_conv": "conv1.0"}
        config = {"architecture": "test_resnet", "num_classes": 10, "pretrained_cfg": cfg}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return f"local-dir:{tmp_path}"

    return write


@NEW_HEAD
def test_a_folder_must_fill_the_model(new_head_classes: int | None, folder: Callable[..., str]) -> None:
    assert load_pretrained(folder(), new_head_classes=new_head_classes)
    with pytest.raises(CheckpointError, match=CONV):
        load_pretrained(folder(without=CONV), new_head_classes=new_head_classes)
    with pytest.raises(CheckpointError, match="extra_table"):
        load_pretrained(folder(extra="extra_table"), new_head_classes=new_head_classes)


def test_a_class_count_in_the_arguments_makes_no_random_classifier(folder: Callable[..., str]) -> None:
    with pytest.raises(CheckpointError, match=r"2 keys are missing|shapes differ"):
        load_pretrained(folder(), kwargs={"num_classes": 4})


def test_a_checkpoint_replaces_the_weights_of_a_folder(
    folder: Callable[..., str], state: dict[str, Tensor], tmp_path: Path
) -> None:
    name = folder()
    path = saved(state | {CONV: -state[CONV]}, tmp_path / "other.safetensors")
    loaded = load_pretrained(name, checkpoint=path)
    assert torch.equal(loaded.model.state_dict()[CONV], -state[CONV])
    path = saved(state | {CONV: state[CONV][:, :, :1, :1]}, tmp_path / "narrow.safetensors")
    with pytest.raises(CheckpointError, match="shapes differ"):
        load_pretrained(name, checkpoint=path)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"block": "x"},
        {"global_pool": True},
        {"block_reduce_first": 0},
        {"device": "meta"},
        {"stem_type": 3.5},
    ],
)
def test_arguments_that_timm_chokes_on_are_refused(
    kwargs: dict[str, object], state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = saved(state, tmp_path / "whole.safetensors")
    with pytest.raises(CheckpointError, match=r"test_resnet.*model.kwargs"):
        load_pretrained("test_resnet", checkpoint=path, kwargs=kwargs)


def test_overflow_of_wider_floats_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    wide = torch.full_like(state["bn1.bias"], 1e300, dtype=torch.float64)
    path = saved(state | {"bn1.bias": wide}, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match=r"bn1.bias has values that are not finite"):
        load_pretrained("test_resnet", checkpoint=path)


@pytest.mark.parametrize("prefix", ["model.", "net.backbone.", "timm_model.", "ema."])
@pytest.mark.parametrize("new_head_classes", [None, 3])
def test_a_model_inside_another_module_is_found(
    prefix: str, new_head_classes: int | None, state: dict[str, Tensor], tmp_path: Path
) -> None:
    wrapped = {f"{prefix}{key}": tensor for key, tensor in state.items()}
    path = saved({**wrapped, "criterion.weight": torch.ones(10)}, tmp_path / "wrapped.safetensors")
    found = load_pretrained("test_resnet", checkpoint=path, new_head_classes=new_head_classes)
    assert torch.equal(found.model.state_dict()[CONV], state[CONV])
    assert found.spec.num_classes == (new_head_classes or 10)
    told = f"{path}: using the weights under {prefix[:-1]}, without 1 other tensor"
    assert [notice.removeprefix("checkpoint ") for notice in found.notices] == [told]


def test_two_models_inside_another_module_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    both = {f"{prefix}{key}": tensor.clone() for prefix in ("a.", "b.") for key, tensor in state.items()}
    with pytest.raises(CheckpointError, match=r"keys are unknown \(a\."):
        load_pretrained("test_resnet", checkpoint=saved(both, tmp_path / "both.safetensors"))
