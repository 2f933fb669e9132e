"""Like channels become neighbours where a pattern has blocks of several inputs."""

from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from torch import nn

from nestify.errors import UnsupportedModelError
from nestify.model.graph.groups import Group, Member
from nestify.model.spec import describe_model
from nestify.recipe.levels import Level, parse_pattern
from nestify.schedule import likeness
from nestify.schedule.likeness import group_channels, inputs_per_block, likeness_orders
from nestify.schedule.weights import select_entry_levels


def levels(pattern: str) -> list[Level]:
    return [Level("core", 0.8, parse_pattern(pattern)), Level("full", 0.0)]


@pytest.mark.parametrize(
    ("pattern", "size"), [("1x4", 4), ("1x2", 2), ("32x1", 1), ("4x4", 1), ("unstructured", 1)]
)
def test_only_blocks_of_one_output_have_inputs_to_group(pattern: str, size: int) -> None:
    assert inputs_per_block(levels(pattern)) == size


def test_channels_that_matter_for_the_same_outputs_become_neighbours() -> None:
    """Channels 0, 3, 5, 6 are read by the first output, the others by the second."""
    first = np.array([True, False, False, True, False, True, True, False])
    weight = torch.from_numpy(np.stack([first * 2.0, ~first * 1.0]))[:, :, None, None]
    members = (Member("reader", 1, np.arange(8)[:, None]), Member("writer", 0, np.arange(8)[:, None]))
    tensors = {"reader": weight, "writer": torch.ones(8, 3, 1, 1)}
    [order] = likeness_orders([Group(8, members, ())], tensors, 4)
    assert [set(order[:4].tolist()), set(order[4:].tolist())] == [{0, 3, 5, 6}, {1, 2, 4, 7}]


def test_channels_that_no_weight_reads_stay() -> None:
    members = (Member("writer", 0, np.arange(5)[:, None]), Member("bias", 0, np.arange(5)[:, None]))
    tensors = {"writer": torch.rand(5, 3), "bias": torch.rand(5)}
    [order] = likeness_orders([Group(5, members, ())], tensors, 4)
    assert order.tolist() == [0, 1, 2, 3, 4]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # heavy tails, as trained weights have
            module.weight.data *= torch.randn(module.weight.shape[1])[:, None, None].exp()
    return model


def test_the_function_stays_and_blocks_keep_more_of_the_weights(network: nn.Module) -> None:
    images = torch.randn(2, 3, 96, 96)
    spec = describe_model(network)
    grouped = deepcopy(network)
    assert group_channels(grouped, spec, levels("1x4"), None) is None
    with torch.no_grad():
        torch.testing.assert_close(grouped(images), network(images), rtol=1e-4, atol=1e-5)

    def kept(model: nn.Module) -> float:
        weights = {name: dict(model.named_parameters())[name].data for name in spec.maskable}
        entry = select_entry_levels(weights, levels("1x4"), "uniform").tensors
        return sum(float((weights[n].square() * (entry[n] == 1)).sum()) for n in weights)

    assert kept(grouped) > 1.05 * kept(network)


def test_other_patterns_leave_the_channels_alone(network: nn.Module) -> None:
    before = deepcopy(network.state_dict())
    assert group_channels(network, describe_model(network), levels("32x1"), None) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_network_that_cannot_be_traced_is_told(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UnsupportedModelError("it cannot be traced")

    monkeypatch.setattr(likeness, "map_channels", refuse)
    before = deepcopy(network.state_dict())
    problem = group_channels(network, describe_model(network), levels("1x4"), None)
    assert problem is not None
    assert "it cannot be traced" in problem
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
