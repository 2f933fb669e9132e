"""Conversion of kept units to kept indices and back, and inconsistent axes as in an untrusted file."""

import gc
import weakref
from collections import OrderedDict
from copy import copy, deepcopy

import numpy as np
import pytest
import timm
import torch

from nestify.errors import UnsupportedModelError
from nestify.model.graph import channel_map
from nestify.model.graph.axes import Axes, Indices, take_indices
from nestify.model.graph.channel_map import ChannelMap, map_built_channels, map_channels
from nestify.model.spec import describe_model
from tests.model.graph.builders import NAMES, example, half, narrow, random_units

CPU = torch.device("cpu")


def replace_indices(axes: Axes, name: str, dim: int, kept: Indices | None) -> dict[str, dict[int, Indices]]:
    """Return axes with other kept indices for one dimension; None omits the dimension."""
    new = {key: dict(dims) for key, dims in axes.items()}
    new.setdefault(name, {})
    if kept is None:
        del new[name][dim]
    else:
        new[name][dim] = kept
    return new


@pytest.mark.parametrize("name", NAMES)
def test_axes_and_kept_units_are_inverse(name: str) -> None:
    channels = example(name).channels
    for seed in range(3):
        kept = random_units(channels, seed)
        axes = channels.axes(kept)
        assert all(np.array_equal(a, b) for a, b in zip(channels.kept_units(axes), kept, strict=True))
        named = {key: dims for key, dims in axes.items() if key in channels.names}
        assert all(np.array_equal(a, b) for a, b in zip(channels.kept_units(named), kept, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_axes_name_every_dimension_with_channels(name: str) -> None:
    case = example(name)
    axes = case.channels.axes([None] * len(case.channels.groups))
    members = {(member.name, member.dim) for group in case.channels.groups for member in group.members}
    assert {(key, dim) for key, dims in axes.items() for dim in dims} == members
    state = case.model.state_dict()
    assert set(case.channels.names) <= set(state)
    for key, dim in members:
        if key in state:
            assert np.array_equal(axes[key][dim], np.arange(state[key].shape[dim]))


def test_kept_indices_are_those_of_the_kept_units() -> None:
    """Keep half of the trunk, and the second of two heads: its queries, keys and values."""
    channels = example("test_vit").channels
    kept = [np.arange(g.units) for g in channels.groups]
    kept[0] = np.arange(0, 64, 2)
    kept[1] = np.array([1])
    axes = channels.axes(kept)
    second = np.concatenate([np.arange(start, start + 32) for start in (32, 96, 160)])
    assert np.array_equal(axes["blocks.0.attn.qkv.weight"][0], second)
    assert np.array_equal(axes["blocks.0.attn.qkv.weight"][1], np.arange(0, 64, 2))
    assert np.array_equal(axes["blocks.1.attn.qkv.bias"][0], np.arange(192))


def test_some_tensors_are_enough_to_find_the_units() -> None:
    """A file has no axes for the tensors that each level owns."""
    channels = example("test_resnet").channels
    kept = half(channels)
    axes = channels.axes(kept)
    partial = {key: dims for key, dims in axes.items() if ".bn" not in key}
    found = channels.kept_units(partial, among=partial)
    assert all(np.array_equal(a, b) for a, b in zip(found, kept, strict=True))
    with pytest.raises(UnsupportedModelError, match="contradict those of the channels"):
        channels.kept_units(partial)


TRUNK = "blocks.2.mlp.fc2.weight"
CONTRADICTIONS: dict[str, tuple[str, int, Indices | None]] = {
    "dropped here, kept there": (TRUNK, 0, np.arange(31)),
    "another channel": (TRUNK, 0, np.r_[0:31, 40]),
    "all of them": (TRUNK, 0, None),
    "half a head": ("blocks.2.attn.proj.weight", 1, np.arange(16)),
    "no channel": ("cls_token", 2, np.arange(0)),
    "out of range": (TRUNK, 0, np.r_[0:31, 64]),
    "negative": (TRUNK, 0, np.r_[-1, 1:32]),
    "not ascending": (TRUNK, 0, np.arange(32)[::-1]),
    "twice": (TRUNK, 0, np.r_[0:32, 31]),
    "no channels there": ("head.weight", 0, np.arange(5)),
    "no such dimension": ("head.weight", 2, np.arange(5)),
    "no such tensor": ("neck.weight", 0, np.arange(5)),
    "a dimension from the end": ("head.weight", -1, np.arange(32)),
}


@pytest.mark.parametrize("why", CONTRADICTIONS)
def test_axes_that_contradict_each_other_are_refused(why: str) -> None:
    channels = example("test_vit").channels
    name, dim, kept = CONTRADICTIONS[why]
    axes = replace_indices(channels.axes(half(channels)), name, dim, kept)
    with pytest.raises(UnsupportedModelError, match=r"contradict|contain no complete unit") as caught:
        channels.skeleton(axes, training=False, device=CPU)
    assert repr(name) in str(caught.value)
    assert str(caught.value).endswith("use a file that was made for this model")
    assert "\n" not in str(caught.value)


def test_the_first_tensor_of_a_group_may_be_the_inconsistent_one() -> None:
    channels = example("test_vit").channels
    member = channels.groups[1].members[0]
    axes = replace_indices(channels.axes(half(channels)), member.name, member.dim, np.arange(192))
    with pytest.raises(UnsupportedModelError, match=r"attn\.qkv\.bias"):
        channels.skeleton(axes, training=False, device=CPU)


def test_a_copy_is_the_map_itself() -> None:
    channels = example("test_resnet").channels
    assert deepcopy(channels) is channels
    assert copy(channels) is channels
    with pytest.raises(ValueError, match="read-only"):
        channels.groups[0].members[0].indices[0] = 1
    with pytest.raises(TypeError):
        channels.frozen["conv1.0.weight", 1] = ""  # type: ignore[index]


def test_the_map_does_not_keep_the_model_alive() -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    weight = weakref.ref(model.get_parameter("fc.weight"))
    channels = map_channels(model, (3, 64, 64))
    narrow(channels, half(channels))
    del model
    gc.collect()
    assert weight() is None


def groups_of(channels: ChannelMap) -> list[list[tuple[str, int, list[object]]]]:
    return [[(m.name, m.dim, m.indices.tolist()) for m in group.members] for group in channels.groups]


def test_the_channels_of_an_architecture_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_map, "_remembered", OrderedDict())
    first, second = (timm.create_model("test_resnet", num_classes=10) for _ in range(2))
    spec = describe_model(first, (3, 64, 64))
    channels = map_built_channels(first, spec)
    weight = weakref.ref(first.get_parameter("fc.weight"))
    del first
    gc.collect()
    assert weight() is None
    with monkeypatch.context() as patch:
        patch.setattr(channel_map, "trace", None)
        assert map_built_channels(second, spec) is channels
    assert groups_of(channels) == groups_of(map_channels(second, (3, 64, 64)))


def test_every_difference_of_the_architecture_is_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_map, "REMEMBERED", 2)
    monkeypatch.setattr(channel_map, "_remembered", OrderedDict())
    networks = {
        "": timm.create_model("test_resnet", num_classes=10),
        "width": timm.create_model("test_resnet", num_classes=10, channels=(16, 32, 64, 96)),
        "classes": timm.create_model("test_resnet", num_classes=7),
    }
    networks["bfloat16"] = deepcopy(networks[""]).bfloat16()
    searched: list[object] = []

    def count(network: torch.nn.Module, *given: object, **options: object) -> object:
        searched.append(network)
        return object()

    monkeypatch.setattr(channel_map, "map_channels", count)
    for network in networks.values():
        map_built_channels(network, describe_model(network, (3, 64, 64)))
    assert searched == list(networks.values())
    same = networks["bfloat16"]
    map_built_channels(same, describe_model(same, (3, 64, 64)))
    assert searched == list(networks.values())
    map_built_channels(same, describe_model(same, (3, 96, 96)))
    map_built_channels(same, describe_model(same, (3, 64, 64)), keep_outputs=False)
    assert searched[4:] == [same, same]
    assert len(channel_map._remembered) == 2


@pytest.mark.parametrize("kept", [[0, 1, 2], [1], [3, 4, 7], [0, 7], []])
def test_consecutive_indices_are_taken_as_a_view(kept: list[int]) -> None:
    tensor = torch.arange(40.0).reshape(5, 8).requires_grad_()
    rows = np.array([1, 2])
    found = take_indices(tensor, {1: np.array(kept, dtype=np.int64), 0: rows})
    assert torch.equal(found, tensor[1:3][:, kept])
    assert (found.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()) == (
        kept in ([0, 1, 2], [1])
    )
    found.sum().backward()
    expected = torch.zeros(5, 8)
    expected[1:3, kept] = 1
    assert tensor.grad is not None
    assert torch.equal(tensor.grad, expected)
