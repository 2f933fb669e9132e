"""The groups of coupled channels in small structures with known groups."""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from nestify.model.graph.channel_map import ChannelMap, map_channels, permute_channels
from nestify.model.graph.groups import Group
from tests.model.graph.builders import NAMES, difference, example, random_units, run_level, zero_units

Change = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """A convolution to `channels` channels, a change of them, pooling and a classifier."""

    def __init__(self, channels: int, change: Change) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        width = change(torch.zeros(1, channels, 8, 8)).shape[1]
        self.change = change
        self.last = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.change(self.first(images)).mean((2, 3)))
        return logits


def shuffle(y: Tensor) -> Tensor:
    return y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def swap_pair(y: Tensor) -> Tensor:
    """Tie pairs of channels, and swap the channels of the first pair."""
    y = functional.group_norm(y, 16)
    return torch.cat([y[:, 1:2], y[:, :1], y[:, 2:]], 1)


GAINS = torch.tensor([1.0] * 16 + [2.0] * 16).view(1, -1, 1, 1)
RAMP = torch.arange(32.0).view(1, -1, 1, 1)

STRUCTURES: dict[str, tuple[int, Change, list[tuple[int, int, int]]]] = {
    "in place": (32, functional.relu_, [(32, 1, 1)]),
    "squeeze and excite": (32, lambda y: y * y.mean((2, 3), keepdim=True).sigmoid(), [(32, 1, 1)]),
    "shuffle": (32, shuffle, [(16, 2, 2)]),
    "gated halves": (32, lambda y: y.chunk(2, 1)[0] * y.chunk(2, 1)[1].sigmoid(), [(16, 2, 1)]),
    "glu": (32, lambda y: functional.glu(y, 1), [(16, 2, 1)]),
    "slices": (32, lambda y: y[:, :16] + y[:, 16:], [(16, 2, 1)]),
    "halves change places": (32, lambda y: y + torch.cat([y[:, 16:], y[:, :16]], 1), [(16, 2, 2)]),
    "maxout": (32, lambda y: y.unflatten(1, (16, 2)).amax(2), [(16, 2, 1)]),
    "radix": (32, lambda y: y.unflatten(1, (2, 16)).softmax(1).sum(1), [(16, 2, 1)]),
    "pixel shuffle": (32, lambda y: functional.pixel_shuffle(y, 2), [(8, 4, 1)]),
    "pixel unshuffle": (16, lambda y: functional.pixel_unshuffle(y, 2), [(16, 1, 4)]),
    "repeat": (16, lambda y: y.repeat(1, 2, 1, 1), [(16, 1, 2)]),
    "repeat interleave": (16, lambda y: y.repeat_interleave(2, 1), [(16, 1, 2)]),
    "one repeated": (32, lambda y: y * torch.ones(1, 1, 1, 1).repeat(1, 32, 1, 1), [(32, 1, 1)]),
    "one interleaved": (
        32,
        lambda y: y * torch.ones(1, 1).repeat_interleave(32, 1)[..., None, None],
        [(32, 1, 1)],
    ),
    "both": (16, lambda y: torch.cat([y.relu(), y], 1), [(16, 1, 2)]),
    "zeros appended": (32, lambda y: functional.pad(y, (0, 0, 0, 0, 0, 16)), [(32, 1, 1), (16, 0, 1)]),
    "mean of all": (32, lambda y: y * y.mean(1, keepdim=True), [(32, 1, 1)]),
    "softmax of all": (32, lambda y: y * y.softmax(1), [(32, 1, 1)]),
    "4 norm groups": (32, lambda y: functional.group_norm(y, 4), [(8, 4, 4)]),
    "16 norm groups": (32, lambda y: functional.group_norm(y, 16), [(16, 2, 2)]),
    "an activation for some": (
        32,
        lambda y: torch.cat([y[:, :8].relu(), y[:, 8:]], 1),
        [(8, 1, 1), (24, 1, 1)],
    ),
    "two gains": (32, lambda y: y * GAINS, [(16, 1, 1), (16, 1, 1)]),
    "a gain for each": (32, lambda y: y * RAMP, []),
    "swapped pair": (32, swap_pair, [(15, 2, 2)]),
    "flip": (32, lambda y: y + y.flip(1), []),
    "roll": (32, lambda y: y + y.roll(3, 1), []),
    "every second": (32, lambda y: y[:, ::2] * y[:, 1::2], []),
    "picked": (32, lambda y: y[:, torch.arange(16)], []),
    "sorted": (32, lambda y: y.sort(1).values, []),
    "place of the largest": (32, lambda y: y + y.max(1, keepdim=True).indices, []),
    "the largest": (32, lambda y: y + y.max(1, keepdim=True).values, [(32, 1, 1)]),
    "outer product": (16, lambda y: (y[:, :, None] * y[:, None]).flatten(1, 2), []),
    "depthwise": (
        16,
        lambda y: functional.conv2d(y, torch.ones(16, 1, 3, 3, dtype=y.dtype), groups=16),
        [(16, 1, 1)],
    ),
    "2 groups": (
        32,
        lambda y: functional.conv2d(y, torch.ones(32, 16, 1, 1, dtype=y.dtype), groups=2),
        [(16, 2, 0), (16, 0, 2)],
    ),
}
"""Name -> channels, the change, and per group: units, channels of a unit in `first` and in `last`."""


@pytest.mark.parametrize("name", STRUCTURES)
def test_groups_of_known_structures(name: str) -> None:
    channels, change, expected = STRUCTURES[name]
    model = Between(channels, change).double().eval()
    found = map_channels(model, (3, 8, 8))
    each = [
        (group.units, per_unit(found, number, "first.weight", 0), per_unit(found, number, "last.weight", 1))
        for number, group in enumerate(found.groups)
    ]
    assert each == expected
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        logits = model(images)
        permuted = deepcopy(model)
        permute_channels(permuted, found, [np.arange(group.units)[::-1] for group in found.groups])
        assert difference(permuted(images), logits) < 1e-12
        kept = random_units(found, 0, [k for k, group in enumerate(found.groups) if not group.mixed])
        assert (
            difference(run_level(found, model, kept, images), zero_units(found, model, kept)(images)) < 1e-12
        )


@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("mean of all", ("mean",)),
        ("softmax of all", ("softmax",)),
        ("the largest", ("max",)),
        ("4 norm groups", ("group_norm",)),
        ("16 norm groups", ()),
        ("radix", ()),
    ],
)
def test_operators_that_combine_all_channels_are_named(name: str, operators: tuple[str, ...]) -> None:
    channels, change, _ = STRUCTURES[name]
    (group,) = map_channels(Between(channels, change), (3, 8, 8)).groups
    assert group.mixed == operators


def per_unit(channels: ChannelMap, number: int, name: str, dim: int) -> int:
    """Return the number of channels of a group's unit along a dimension of a tensor."""
    members = [m for m in channels.groups[number].members if (m.name, m.dim) == (name, dim)]
    return members[0].indices.shape[1] if members else 0


def test_a_unit_is_a_complete_head_of_queries_keys_and_values() -> None:
    channels = example("test_vit").channels
    heads = [group for group in channels.groups if group.units == 2]
    assert len(heads) == 6
    qkv, bias, proj = heads[0].members
    assert (qkv.name, qkv.dim) == ("blocks.0.attn.qkv.weight", 0)
    expected = np.arange(3 * 64).reshape(3, 2, 32).transpose(1, 0, 2).reshape(2, -1)
    assert np.array_equal(qkv.indices, expected)
    assert np.array_equal(bias.indices, expected)
    assert (proj.name, proj.dim) == ("blocks.0.attn.proj.weight", 1)
    assert np.array_equal(proj.indices, np.arange(64).reshape(2, 32))


def test_the_trunk_of_a_transformer_is_one_group() -> None:
    channels = example("test_vit").channels
    trunk = channels.groups[0]
    members = {(member.name, member.dim) for member in trunk.members}
    assert trunk.units == 64
    assert {("cls_token", 2), ("pos_embed", 2), ("patch_embed.proj.weight", 0), ("head.weight", 1)} < members
    assert {("blocks.3.norm1.weight", 0), ("blocks.5.mlp.fc2.weight", 0)} < members
    assert trunk.mixed == ("layer_norm",)


def test_a_batch_norm_and_a_depthwise_layer_belong_to_their_convolution() -> None:
    channels = example("mobilenetv3_small_050").channels
    group = next(g for g in channels.groups if ("blocks.1.0.conv_dw.weight", 0) in places(g))
    norm = {(f"blocks.1.0.bn2.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var")}
    assert norm | {("blocks.1.0.conv_pw.weight", 0), ("blocks.1.0.conv_pwl.weight", 1)} < places(group)
    assert ("blocks.1.0.conv_dw.weight", 1) not in places(group)
    assert not group.mixed


def places(group: Group) -> set[tuple[str, int]]:
    return {(member.name, member.dim) for member in group.members}


class Tokens(nn.Module):
    """Register tokens and pixels, two layers with a tied weight, and the mean over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 1)
        self.registers = nn.Parameter(torch.randn(1, 2, 8))
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.registers.expand(tokens.shape[0], -1, -1), tokens], 1)
        logits: Tensor = self.head(self.two(self.one(tokens).relu()).mean(1))
        return logits


def test_tokens_are_not_channels() -> None:
    channels = map_channels(Tokens(), (3, 2, 2))
    assert ("registers", 1) not in {place for group in channels.groups for place in places(group)}
    assert channels.frozen["registers", 1] == "no weight multiplies it: a token, not a channel"


def test_a_tied_weight_is_one_tensor() -> None:
    """One set of channels is the input and output of both layers."""
    model = Tokens().double()
    channels = map_channels(model, (3, 2, 2))
    (group,) = channels.groups
    assert group.units == 8
    assert {("one.weight", 0), ("one.weight", 1), ("one.bias", 0), ("two.bias", 0)} < places(group)
    assert set(channels.names) == set(model.state_dict()) - {"two.weight", "unused.weight", "unused.bias"}
    images = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    logits = model(images)
    permute_channels(model, channels, [np.random.default_rng(0).permutation(8)])
    assert model.two.weight is model.one.weight
    assert difference(model(images), logits) < 1e-12


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("flip", "flip in the model"),
        ("sorted", "sort in the model"),
        ("a gain for each", "no other channel is like it"),
    ],
)
def test_a_dimension_outside_of_groups_has_a_reason(name: str, reason: str) -> None:
    channels, change, _ = STRUCTURES[name]
    found = map_channels(Between(channels, change), (3, 8, 8))
    assert found.unknown == ({"sort"} if name == "sorted" else set())
    assert found.frozen["first.weight", 0] == reason
    assert found.frozen["last.weight", 0] == "the model's output"
    assert found.frozen["first.weight", 1] == "conv2d in first"


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_in_a_group_or_has_a_reason(name: str) -> None:
    channels, model = example(name).channels, example(name).model
    grouped = {place for group in channels.groups for place in places(group)}
    assert not channels.unknown
    for key, parameter in model.named_parameters():
        for dim in range(min(parameter.ndim, 2)):
            assert parameter.shape[dim] == 1 or (key, dim) in grouped | set(channels.frozen)


def test_groups_do_not_depend_on_the_weights() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_resnet", num_classes=10)
    found = map_channels(model, (3, 64, 64))
    assert [places(g) for g in found.groups] == [places(g) for g in example("test_resnet").channels.groups]
