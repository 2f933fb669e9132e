"""Any blocks of a toy network can be skipped, which gives the shallower network written by hand."""

import random

import pytest
import torch
from torch import Tensor, nn

from nestify.errors import UnsupportedModelError
from tests.model.graph.block_builders import CPU, KINDS, SIZE, Net, level_without, map_model


@pytest.mark.parametrize("seed", range(6))
def test_any_blocks_can_be_skipped(seed: int) -> None:
    rng = random.Random(seed)
    kinds = list(KINDS)
    net = Net(rng.sample(kinds, 6) + rng.choices(kinds, k=3)).double()
    channels, layers = map_model(net)
    assert [block.name for block in layers.blocks] == [f"blocks.{k}" for k in range(9)]
    assert all(block.is_module and block.shape == (4, 8, 8) for block in layers.blocks)
    images = torch.randn(3, *SIZE, dtype=torch.float64)
    for _ in range(6):
        names = [block.name for block in rng.sample(layers.blocks, rng.randint(0, 9))]
        level = level_without(names, channels, layers, net)
        net.skip(names)
        net.zero_grad()
        logits = net(images)
        logits.sum().backward()
        torch.testing.assert_close(level(images), logits, rtol=1e-12, atol=1e-12)
        used = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
        assert set(level.state_dict()) == used
        assert set(channels.names) - layers.unused_names(names) == used
    net.skip([])


def test_a_block_has_the_tensors_that_only_it_reads() -> None:
    net = Net(["gamma", "tied", "tied"])
    _, layers = map_model(net)
    first, *tied = layers.blocks
    assert first.parameters == ("blocks.0.gamma", "blocks.0.conv.weight", "blocks.0.conv.bias")
    assert [block.parameters for block in tied] == [(), ()]
    shared = {"blocks.1.conv.weight", "blocks.1.conv.bias"}
    assert layers.unused_names(["blocks.1"]) == layers.unused_names(["blocks.2"]) == frozenset()
    assert layers.unused_names(["blocks.1", "blocks.2"]) == shared
    assert layers.unused_names(["blocks.0", "blocks.1"]) == set(first.parameters)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x))


class Sequence(nn.Module):
    """Blocks in nested sequences, and a pair of named blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Sequential(Norms(), Norms()), nn.Sequential(Norms()))
        self.pair = nn.Sequential()
        self.pair.add_module("attention", Norms())
        self.pair.add_module("mlp", Norms())
        self.head = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pair(self.stages(images)).mean((2, 3)))
        return logits


def test_elements_of_a_sequence_are_blocks_and_named_modules_are_one_block() -> None:
    _, layers = map_model(Sequence())
    assert [block.name for block in layers.blocks] == ["stages.0.0", "stages.0.1", "stages.1.0", "pair"]
    tensors = (
        "norm.weight",
        "norm.bias",
        "conv.weight",
        "conv.bias",
        "norm.running_mean",
        "norm.running_var",
    )
    assert set(layers.blocks[0].parameters) == {f"stages.0.0.{name}" for name in tensors}


class Alternating(nn.Module):
    """A module with two branches that downsamples, so it is not the identity without them."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 3, 2, stride=2)
        self.attention, self.mlp = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        x = x + self.attention(x)
        return x + self.mlp(x).relu()


def test_branches_are_numbered_in_their_module() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = Alternating(), Alternating(), nn.Linear(3, 4)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.head(self.b(self.a(images)).mean((2, 3)))
            return logits

    model = Two()
    channels, layers = map_model(model)
    assert [block.name for block in layers.blocks] == ["a#1", "a#2", "b#1", "b#2"]
    assert not any(block.is_module for block in layers.blocks)
    assert [[block.name for block in stage.blocks] for stage in layers.stages] == [
        ["a#1"],
        ["a#2"],
        ["b#1"],
        ["b#2"],
    ]
    images = torch.randn(2, *SIZE)
    level = level_without(["a#1", "b#2"], channels, layers, model)
    for skipped in (model.a.attention, model.b.mlp):
        nn.init.zeros_(skipped.weight)
        nn.init.zeros_(skipped.bias)
    torch.testing.assert_close(level(images), model(images))


class Again(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.head = block, nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(self.block(images)).mean((2, 3)))
        return logits


def test_elements_of_a_sequence_that_is_called_again_are_blocks() -> None:
    _, layers = map_model(Again(nn.Sequential(Norms(), Norms())))
    assert [block.name for block in layers.blocks] == ["block.0", "block.1", "block.0@1", "block.1@1"]


def test_the_second_call_of_a_module_is_a_separate_block() -> None:
    model = Again(Norms())
    channels, layers = map_model(model)
    assert [block.name for block in layers.blocks] == ["block", "block@1"]
    images = torch.randn(2, *SIZE)
    expected = model.head(model.block(images).mean((2, 3)))
    for name in ("block", "block@1"):
        torch.testing.assert_close(level_without([name], channels, layers, model)(images), expected)
    assert layers.unused_names(["block"]) == frozenset()
    assert len(layers.unused_names(["block", "block@1"])) == 6


class WritesIntoTheTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Norms(), nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = images * 2
        y = self.block(x)
        y[:, :1] = 0
        logits: Tensor = self.head((x + y).mean((2, 3)))
        return logits


def test_a_write_into_the_output_of_a_skipped_block_is_refused() -> None:
    channels, layers = map_model(WritesIntoTheTrunk())
    assert [block.name for block in layers.blocks] == ["block"]
    for use in (
        lambda: layers.unused_names(["block"]),
        lambda: channels.skeleton(
            {}, training=False, device=CPU, replacements=layers.replacements(["block"])
        ),
    ):
        with pytest.raises(UnsupportedModelError) as caught:
            use()
        message = str(caught.value)
        assert message.startswith("fill in the model writes in place")
        assert "blocks cannot be scheduled" in message
        assert message.endswith("--schedule weight works for every model")
    images = torch.randn(2, *SIZE)
    model = WritesIntoTheTrunk().eval()
    torch.testing.assert_close(level_without([], *map_model(model), model)(images), model(images))


class Contiguous(Norms):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous()


class Strided(nn.Module):
    """Takes a view after a block whose input is not contiguous and whose output is."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes, self.block, self.head = writes, Contiguous(), nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block(images.transpose(2, 3)).sin()
        view = x.view(-1, 3, 64)
        if self.writes:
            view[:, :, :8] = 0
        else:
            x = x + view.flip(1).unflatten(2, (8, 8))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_strides_may_differ_before_a_view() -> None:
    model = Strided(writes=False)
    channels, layers = map_model(model)
    assert [block.name for block in layers.blocks] == ["block"]
    images = torch.randn(2, *SIZE)
    x = images.transpose(2, 3).sin()
    expected = model.head((x + x.flip(1)).mean((2, 3)))
    torch.testing.assert_close(level_without(["block"], channels, layers, model)(images), expected)


def test_a_write_through_a_view_that_cannot_be_made_is_refused() -> None:
    model = Strided(writes=True)
    channels, layers = map_model(model)
    images = torch.randn(2, *SIZE)
    torch.testing.assert_close(level_without([], channels, layers, model)(images), model(images))
    with pytest.raises(UnsupportedModelError, match="view in the model does not run in a smaller level"):
        level_without(["block"], channels, layers, model)
