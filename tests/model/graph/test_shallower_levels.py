"""Levels that are both narrower and shallower agree with timm's narrower and shallower models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from nestify.errors import UnsupportedModelError
from nestify.model.graph.axes import Axes
from nestify.model.graph.block_map import BlockMap, map_blocks
from nestify.model.graph.channel_map import ChannelMap, map_channels
from tests.model.graph.block_builders import CPU
from tests.model.graph.builders import cut, difference, half, random_model


@dataclass(frozen=True)
class Case:
    """A timm model and a level of it.

    Attributes:
        name: name of the model in timm.
        side: height and width of the images, in pixels.
        kwargs: arguments of the model.
        smaller: arguments of timm's model of half the width without the skipped blocks.
        skipped: names of the skipped blocks.
        rename: from a state-dict name of the model to that of the smaller model.
    """

    name: str
    side: int
    kwargs: Mapping[str, Any]
    smaller: Mapping[str, Any]
    skipped: tuple[str, ...]
    rename: Callable[[str], str] = str


def fewer_blocks(key: str) -> str:
    """Rename blocks 0, 2, 3 and 5 of six to blocks 0 to 3 of four."""
    for new, old in enumerate((0, 2, 3, 5)):
        if key.startswith(f"blocks.{old}."):
            return key.replace(f"blocks.{old}.", f"blocks.{new}.")
    return key


CASES = {
    "resnet": Case(
        name="test_resnet",
        side=64,
        kwargs={"layers": (2, 2, 3, 2)},
        smaller={"layers": (2, 1, 2, 1), "channels": (16, 24, 24, 48), "stem_width": 8},
        skipped=("layer2.1", "layer3.2", "layer4.1"),
    ),
    "vit": Case(
        name="test_vit",
        side=64,
        kwargs={"img_size": 64},
        smaller={"img_size": 64, "depth": 4, "embed_dim": 32, "num_heads": 1},
        skipped=("blocks.1", "blocks.4"),
        rename=fewer_blocks,
    ),
    "convnext": Case(
        name="test_convnext",
        side=64,
        kwargs={"depths": (2, 1, 2, 1)},
        smaller={"depths": (1, 1, 1, 1), "dims": (12, 16, 24, 32)},
        skipped=("stages.0.blocks.1", "stages.2.blocks.1"),
    ),
}


@dataclass(frozen=True)
class Opened:
    model: nn.Module
    channels: ChannelMap
    layers: BlockMap
    axes: Axes
    images: Tensor


@cache
def open_case(key: str) -> Opened:
    """Make one of `CASES` in float64, with the axes of half its width; tests must not change it."""
    case = CASES[key]
    model = random_model(case.name, **case.kwargs)
    channels = map_channels(model, (3, case.side, case.side))
    images = torch.randn(3, 3, case.side, case.side, dtype=torch.float64)
    return Opened(model, channels, map_blocks(channels), channels.axes(half(channels)), images)


def tensors_of_level(key: str) -> dict[str, Tensor]:
    """Return the tensors that a level reads, cut to its width; differentiable."""
    case, found = CASES[key], open_case(key)
    unused = found.layers.unused_names(case.skipped)
    return {n: t for n, t in cut(found.channels, found.model, found.axes).items() if n not in unused}


def timm_of_level(key: str) -> nn.Module:
    case = CASES[key]
    model: nn.Module = timm.create_model(case.name, num_classes=10, **case.smaller)
    state = {case.rename(name): tensor.detach() for name, tensor in tensors_of_level(key).items()}
    left = model.double().load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in left.missing_keys)
    return model.eval()


@pytest.mark.parametrize("key", CASES)
def test_every_block_that_keeps_the_shape_is_found(key: str) -> None:
    """In a ResNet and a ConvNeXt, the first block of a stage may change the shape."""
    names = [block.name for block in open_case(key).layers.blocks]
    assert (
        names
        == {
            "resnet": ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer3.2", "layer4.1"],
            "vit": [f"blocks.{k}" for k in range(6)],
            "convnext": [
                f"stages.{stage}.blocks.{k}" for stage, n in enumerate((2, 1, 2, 1)) for k in range(n)
            ],
        }[key]
    )


@torch.no_grad()
@pytest.mark.parametrize("all_axes", [True, False], ids=["all axes", "axes of used tensors"])
@pytest.mark.parametrize("key", CASES)
def test_a_level_has_the_logits_of_the_smaller_timm_model(key: str, all_axes: bool) -> None:
    found, tensors = open_case(key), tensors_of_level(key)
    axes = found.axes if all_axes else {name: found.axes[name] for name in found.axes if name in tensors}
    replacements = found.layers.replacements(CASES[key].skipped)
    level = found.channels.skeleton(axes, training=False, device=CPU, replacements=replacements)
    assert set(level.state_dict()) == set(tensors)
    reference = timm_of_level(key)
    assert {CASES[key].rename(name) for name, _ in level.named_parameters()} == {
        name for name, _ in reference.named_parameters()
    }
    level.load_state_dict(tensors, assign=True)
    expected = reference(found.images)
    assert difference(level(found.images), expected) < 1e-6 * difference(expected[:1], expected[1:2])


@pytest.mark.parametrize("key", CASES)
def test_a_training_step_agrees_with_timm(key: str) -> None:
    """Logits, running statistics and gradients of the kept weights agree."""
    found, tensors = open_case(key), tensors_of_level(key)
    for name in tensors:
        if "running" in name:
            tensors[name] = tensors[name].clone()
    level = found.channels.skeleton(
        found.axes, training=True, device=CPU, replacements=found.layers.replacements(CASES[key].skipped)
    )
    reference = timm_of_level(key).train()
    expected, logits = reference(found.images), functional_call(level, tensors, (found.images,))
    assert difference(logits, expected) < 1e-6 * difference(expected[:1], expected[1:2])
    expected.square().sum().backward()
    grads = dict(
        zip(
            (names := [name for name, tensor in tensors.items() if tensor.requires_grad]),
            torch.autograd.grad(logits.square().sum(), [tensors[name] for name in names]),
            strict=True,
        )
    )
    theirs = dict(reference.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    for name, grad in grads.items():
        expected_grad = theirs[CASES[key].rename(name)].grad
        assert expected_grad is not None
        assert difference(grad, expected_grad) < 1e-6 * largest
    buffers = dict(reference.named_buffers())
    for name in tensors.keys() - grads.keys():
        assert difference(tensors[name], buffers[CASES[key].rename(name)]) < 1e-10


def test_axes_of_unused_tensors_must_be_consistent() -> None:
    found = open_case("resnet")
    unused = "layer2.1.conv1.weight"
    assert unused in found.layers.unused_names(["layer2.1"])
    axes = {name: dict(dims) for name, dims in found.axes.items()}
    axes[unused][1] = axes[unused][1][:-1]
    with pytest.raises(UnsupportedModelError, match=r"'layer2\.1\.conv1\.weight', dimension 1"):
        found.channels.skeleton(
            axes, training=False, device=CPU, replacements=found.layers.replacements(["layer2.1"])
        )


def test_axes_must_not_omit_a_tensor_that_the_level_reads() -> None:
    found = open_case("resnet")
    axes = {name: dims for name, dims in found.axes.items() if name != "layer2.0.conv2.weight"}
    with pytest.raises(UnsupportedModelError, match=r"'layer2\.0\.conv2\.weight', dimension 1"):
        found.channels.skeleton(
            axes, training=False, device=CPU, replacements=found.layers.replacements(["layer2.1"])
        )
