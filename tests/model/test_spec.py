"""Descriptions of timm models: maskable weights, tied names, and building a model again."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from nestify.errors import RecipeError, UnsupportedModelError
from nestify.model.spec import build_model, describe_model, synthetic_input
from nestify.schedule.nest import masked_names

MakeModel = Callable[..., nn.Module]


def layer_weights(model: nn.Module) -> set[str]:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_nfnet"])
def test_weights_of_convolutions_and_linear_layers_are_maskable(name: str, make_model: MakeModel) -> None:
    model = make_model(name)
    assert set(describe_model(model).maskable) == layer_weights(model)


def test_raw_weights_are_maskable_but_tables_and_tokens_are_not() -> None:
    with torch.device("meta"):
        model = timm.create_model("sequencer2d_s")
        other = timm.create_model("swin_tiny_patch4_window7_224")
    maskable = set(describe_model(model).maskable)
    lstm = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LSTM)
        for part, _ in module.named_parameters(recurse=False)
        if part.startswith("weight")
    }
    assert lstm
    assert lstm <= maskable
    assert not any("table" in name for name in describe_model(other).maskable)


def test_weights_of_a_shared_module_are_listed_once(make_model: MakeModel) -> None:
    model = make_model("coat_tiny", img_size=32)
    spec = describe_model(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert len({id(parameters[name]) for name in spec.maskable}) == len(spec.maskable)
    assert spec.aliases
    for alias, kept in spec.aliases.items():
        assert model.state_dict(keep_vars=True)[alias] is model.state_dict(keep_vars=True)[kept]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_description_builds_the_same_architecture(name: str, make_model: MakeModel) -> None:
    model = make_model(name, num_classes=7)
    spec = describe_model(model)
    again = build_model(spec.architecture, spec.kwargs)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in again.state_dict().items()} == shapes


def test_depthwise_first_and_classifier_can_be_left_out(make_model: MakeModel) -> None:
    model = make_model("test_efficientnet")
    spec = describe_model(model)
    depthwise = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
    }
    assert depthwise
    masked = masked_names(spec, ["first", "classifier", "depthwise"])
    assert set(spec.maskable) - set(masked) == depthwise | {"conv_stem.weight", "classifier.weight"}
    assert set(masked_names(spec, ["*.conv_dw"])) == set(spec.maskable) - {
        name for name in depthwise if name.endswith("conv_dw.weight")
    }


def test_pattern_that_matches_nothing_is_refused(make_model: MakeModel) -> None:
    spec = describe_model(make_model("test_resnet"))
    with pytest.raises(RecipeError, match=r"schedule.skip = 'layer9.\*' matches no maskable weight"):
        masked_names(spec, ["layer9.*"])
    with pytest.raises(RecipeError, match="leaves no weight of test_resnet to mask"):
        masked_names(spec, ["*"])


def test_refusals_give_the_reason(make_model: MakeModel) -> None:
    with pytest.raises(UnsupportedModelError, match="was not made by timm"):
        describe_model(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="'nothing_like_it' is not in the registry"):
        build_model("nothing_like_it", {})
    with pytest.raises(UnsupportedModelError, match="timm cannot build test_resnet with"):
        build_model("test_resnet", {"no_such_argument": 1})
    with pytest.raises(UnsupportedModelError, match=r"plain values only.*model.kwargs"):
        describe_model(make_model("test_resnet", norm_layer=nn.BatchNorm2d))


def test_synthetic_input_is_a_known_wave() -> None:
    image = synthetic_input((3, 5, 7), batch=2)
    assert image.shape == (2, 3, 5, 7)
    assert image.dtype == torch.float32
    assert float(image[0, 0, 0, 0]) == 0  # sin(0)
    assert float(image.abs().max()) <= 1
    assert len(image.flatten(1).unique(dim=0)) == 2


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_resnet", {"block": "x"}),
        ("test_resnet", {"block_reduce_first": 0}),
        ("test_resnet", {"global_pool": True}),
        ("test_resnet", {"channels": "wide"}),
        ("test_resnet", {"pretrained": True}),
        ("test_vit", {"patch_size": 0}),
        ("test_vit", {"mlp_ratio": 1e308}),
        ("test_vit", {"num_heads": 0}),
        ("test_vit", {"drop_path_rate": "x"}),
    ],
)
@pytest.mark.parametrize("random_weights", [True, False])
def test_arguments_that_timm_chokes_on_are_refused(
    name: str, kwargs: dict[str, Any], random_weights: bool
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"timm cannot build {name} with .*{next(iter(kwargs))}"):
        build_model(name, kwargs, random_weights=random_weights)
