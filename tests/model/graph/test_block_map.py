"""The replacements and unused tensors that a block map returns, and the names that it refuses."""

import gc
import weakref
from copy import copy, deepcopy

import pytest
import torch
from torch import Tensor, nn

from nestify.errors import UnsupportedModelError
from nestify.model.graph.block_map import map_blocks
from nestify.model.graph.channel_map import map_channels
from tests.model.graph.block_builders import CPU, SIZE, Net, map_model


@pytest.mark.parametrize("name", ["blocks.7", "blocks", "", "blocks.0.conv", "conv2d_1", "../head"])
def test_a_name_that_is_not_a_block_is_refused(name: str) -> None:
    _, layers = map_model(Net(["gamma"]))
    for use in (layers.replacements, layers.unused_names):
        with pytest.raises(UnsupportedModelError) as caught:
            use(["blocks.0", name])
        assert str(caught.value).startswith(f"{name!r} is not a block of this model")
        assert str(caught.value).endswith("use a file that was made for this model")


def test_all_tensors_are_used_if_no_block_is_skipped() -> None:
    _, layers = map_model(Net(["gamma", "two"]))
    assert layers.unused_names([]) == frozenset()
    assert not layers.replacements([])


def test_only_tensors_that_evaluation_reads_can_be_unused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.unused = nn.BatchNorm2d(3), nn.Linear(2, 2)
            self.register_buffer("gain", torch.rand(3, 1, 1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(nn.functional.conv2d(x, self.gain[:, None].expand(3, 3, 1, 1)))

    model = nn.Sequential(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    channels, layers = map_model(model)
    own = {f"0.norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert layers.unused_names(["0"]) == set(layers.blocks[0].parameters) == own
    level = channels.skeleton({}, training=False, device=CPU, replacements=layers.replacements(["0"]))
    assert [name for name, _ in level.named_buffers()] == []
    assert set(level.state_dict()) == {"3.weight", "3.bias"}


def test_a_level_may_need_only_the_number_of_images() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.head = nn.Parameter(torch.ones(3, 8, 8)), nn.Linear(3, 4)
            self.block = Added()

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.head(self.block(self.bias.expand(images.shape), images).mean((2, 3)))
            return logits

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor, images: Tensor) -> Tensor:
            return x + self.conv(x * images)

    model = Constant()
    channels, layers = map_model(model)
    assert [block.name for block in layers.blocks] == ["block"]
    level = channels.skeleton({}, training=False, device=CPU, replacements=layers.replacements(["block"]))
    level.load_state_dict({n: t for n, t in model.state_dict().items() if "block" not in n}, assign=True)
    expected = model.head(torch.ones(2, 3))
    torch.testing.assert_close(level(torch.randn(2, *SIZE)), expected)


def test_a_model_may_have_no_blocks() -> None:
    _, layers = map_model(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    )
    assert layers.blocks == ()
    assert layers.stages == ()


def test_a_copy_is_the_map_itself() -> None:
    _, layers = map_model(Net(["gamma"]))
    assert deepcopy(layers) is layers
    assert copy(layers) is layers
    with pytest.raises(TypeError):
        layers.replacements(["blocks.0"])["add"] = "conv2d"  # type: ignore[index]


def test_the_map_does_not_keep_the_model_alive() -> None:
    model = Net(["gamma"])
    weight = weakref.ref(model.head.weight)
    layers = map_blocks(map_channels(model, SIZE))
    del model
    gc.collect()
    assert weight() is None
    assert layers.unused_names(["blocks.0"])
