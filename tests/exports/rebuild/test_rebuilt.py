"""Levels of real models as timm's own, smaller ones: the arguments are known, and so are the logits."""

from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from nestify.exports.rebuild.rebuilt import Rebuilt, rebuild
from nestify.exports.rebuild.search import Search
from nestify.model.spec import describe_model
from tests.exports.builders import alive, half, shallow, without

Kwargs = dict[str, Any]
SIDE = 64
IMAGES = (3, SIDE, SIDE)
OTHERWISE = "its network of the same shapes computes something else"

NARROW: dict[str, tuple[Kwargs, Kwargs]] = {
    "test_vit": ({"img_size": SIDE}, {"embed_dim": 32, "num_heads": 1}),
    "test_resnet": ({}, {"stem_width": 8, "channels": [16, 24, 24, 48]}),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 56, "embed_dim": 32, "depths": [1, 2], "num_heads": [2, 4]},
        {"embed_dim": 16, "num_heads": [1, 2]},
    ),
    "convnext_atto": ({"dims": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}, {"dims": [4, 8, 8, 16]}),
    "cait_xxs24_224": (
        {"img_size": SIDE, "embed_dim": 32, "num_heads": 2, "depth": 1},
        {"embed_dim": 16, "num_heads": 1},
    ),
    "naflexvit_base_patch16_gap": (  # its sizes are fields of a configuration object
        {"embed_dim": 32, "depth": 1, "num_heads": 2},
        {"embed_dim": 16, "num_heads": 1},
    ),
    "densenet121": ({"growth_rate": 8, "block_config": [2, 2]}, {"growth_rate": 4}),
}
"""Arguments of a model, and those of the one with half of every group's units; the others stay."""

SLOW = ("swin_tiny_patch4_window7_224", "convnext_atto", "cait_xxs24_224")
"""Models among them that are `long`."""


def rebuilt(model: nn.Module, level: nn.Module, side: int = SIDE) -> Rebuilt | str:
    spec = describe_model(model, (3, side, side))
    return rebuild(level, spec.architecture, spec.kwargs, spec.input_size)


def check(model: nn.Module, level: nn.Module, expected: Kwargs, side: int = SIDE) -> None:
    """Arguments and logits are the expected ones, in a model that timm builds anew."""
    found = rebuilt(model, level, side)
    assert isinstance(found, Rebuilt), found
    given = describe_model(model).kwargs
    assert found.kwargs == given | expected
    assert not found.model.training
    fresh = timm.create_model(describe_model(model).architecture, **found.kwargs)
    fresh.load_state_dict(found.model.state_dict(), strict=True)
    images = torch.randn(3, 3, side, side)
    with torch.no_grad():
        logits = level(images)
        for network in (found.model, fresh.eval()):
            assert torch.allclose(network(images), logits, rtol=0, atol=1e-6 * float(logits.abs().max()))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in SLOW else ()) for name in NARROW]
)
def test_narrower_levels(name: str) -> None:
    given, expected = NARROW[name]
    model = alive(name, **given)
    side = given.get("img_size", SIDE)
    check(model, half(model, side), expected, side)


@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_level_without_blocks(traced: bool) -> None:
    model = alive("test_vit", img_size=SIDE, depth=5)
    skipped = ("blocks.1", "blocks.3")
    level = shallow(model, SIDE, skipped) if traced else without(model, *skipped)
    check(model, level, {"depth": 3})


@pytest.mark.long
def test_blocks_of_stages() -> None:
    model = alive("convnext_atto", dims=[8, 8, 16, 16], depths=[3, 1, 4, 1])
    blocks = ("stages.0.blocks.0", "stages.2.blocks.1", "stages.2.blocks.2")
    check(model, without(model, *blocks), {"depths": [2, 1, 2, 1]})


def test_fewer_channels_and_fewer_blocks() -> None:
    model = alive("convnext_atto", dims=[8, 16, 16, 16], depths=[2, 3, 1, 1])
    level = half(model, SIDE, ("stages.0.blocks.1", "stages.1.blocks.0"))
    check(model, level, {"dims": [4, 8, 8, 8], "depths": [1, 2, 1, 1]})


def test_the_full_model_is_its_own_level() -> None:
    model = alive("test_resnet")
    check(model, model, {})


@pytest.fixture(scope="module")
def half_vit() -> tuple[nn.Module, nn.Module]:
    """A transformer and its level of half the width; tests must not change them."""
    torch.manual_seed(0)
    model = alive("test_vit", img_size=SIDE)
    return model, half(model, SIDE)


def test_the_level_stays_as_it_was(half_vit: tuple[nn.Module, nn.Module]) -> None:
    model, level = half_vit
    before = {name: tensor.clone() for name, tensor in level.state_dict().items()}
    found = rebuilt(model, level)
    assert isinstance(found, Rebuilt)
    assert not level.training
    memory = {tensor.data_ptr() for tensor in found.model.state_dict().values()}
    for name, tensor in level.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.data_ptr() not in memory


@pytest.mark.parametrize(
    ("name", "given", "why"),
    [
        ("test_efficientnet", {}, "the size of 'conv_stem.weight' is no argument"),
        (
            "test_vit",
            {"embed_dim": 48, "num_heads": 3},
            "no arguments give 'blocks.0.attn.qkv.weight' shape 48x24",
        ),
        # the norm of its weights depends on their number in the full model
        pytest.param(
            "nf_resnet26",
            {"depths": [1, 1, 1, 1], "channels": [64, 64, 128, 128], "alpha": 0.3},
            OTHERWISE,
            marks=pytest.mark.long,
        ),
    ],
)
def test_levels_that_timm_does_not_build(name: str, given: Kwargs, why: str) -> None:
    model = alive(name, **given)
    assert rebuilt(model, half(model, SIDE)) == why


def test_a_length_that_is_no_argument() -> None:
    model = alive("mixer_s32_224", img_size=SIDE)
    found = rebuilt(model, without(model, "blocks.3"))
    assert found == "the length of 'blocks' is no argument"


def test_half_a_block() -> None:
    """timm has no block without attention."""
    model = alive("test_vit", img_size=SIDE, depth=2)
    level = deepcopy(model)
    block = level.get_submodule("blocks.1")
    block.norm1, block.attn = nn.Identity(), Nothing()
    assert rebuilt(model, level) == "it has 'blocks.1.norm1.weight' besides"


class Nothing(nn.Module):
    """A branch that adds nothing; attention is given more than its input."""

    def forward(self, tokens: Tensor, *args: object, **kwargs: object) -> Tensor:
        return torch.zeros_like(tokens)


def test_heads_that_show_in_no_shape_are_told_apart() -> None:
    """Even where the weights hide them: with this scale, attention changes no logit that can be seen."""
    given: Kwargs = {"num_classes": 10, "img_size": SIDE, "global_pool": "avg", "init_values": 1e-9}
    level = timm.create_model("test_vit", num_heads=1, **given).eval()
    model = timm.create_model("test_vit", num_heads=2, **given).eval()
    model.load_state_dict(level.state_dict())
    images = torch.randn(2, *IMAGES)
    with torch.no_grad():
        logits = level(images)
        spread = float((logits[0] - logits[1]).abs().max())
        assert torch.allclose(model(images), logits, rtol=0, atol=1e-4 * spread)
    assert rebuilt(model, level) == OTHERWISE


def test_what_the_search_finds_is_not_trusted(
    half_vit: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Search, "run", lambda search: None)
    assert rebuilt(*half_vit) == OTHERWISE


def test_a_network_that_does_not_run(
    half_vit: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, level = half_vit

    def fail(model: nn.Module, images: Tensor) -> Tensor:
        raise RuntimeError("these heads do not fit")

    monkeypatch.setattr(type(model), "forward", fail)
    assert rebuilt(model, level) == OTHERWISE


@pytest.mark.long
def test_blocks_that_take_turns() -> None:
    """Windows shift in every second block of a Swin; without the first, timm would shift in the wrong one."""
    model = alive("swin_tiny_patch4_window7_224", img_size=112, embed_dim=8, depths=[4, 1], num_heads=[2, 2])
    found = rebuilt(model, without(model, "layers.0.blocks.0"), 112)
    assert found == OTHERWISE
    level = without(model, "layers.0.blocks.0", "layers.0.blocks.1")
    check(model, level, {"depths": [2, 1]}, 112)
