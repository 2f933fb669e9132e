"""MACs of every operator in closed form."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from nestify.channels import find_channels
from nestify.layers import find_layers
from nestify.layers.macs import node_macs
from nestify.report.costs import count_macs

from .builders import Net, opened


def test_those_of_a_convolution_and_of_a_layer() -> None:
    channels, layers = opened(Net(["gamma", "two"]))
    assert [block.macs for block in layers.blocks] == [64 * 4 * 4 * 9, 64 * 4 * 4 * 10]
    assert list(node_macs(channels.traced).values()) == [
        64 * 4 * 27,
        64 * 4 * 36,
        64 * 4 * 36,
        64 * 4 * 4,
        5 * 4,
    ]


SEQUENCER: dict[str, Any] = {
    "layers": [1] * 4,
    "embed_dims": [16, 32, 32, 32],
    "hidden_sizes": [4, 8, 8, 8],
    "img_size": 64,
}


@pytest.mark.parametrize(
    ("name", "kwargs"), [("test_vit", {"img_size": 64}), ("test_resnet", {}), ("sequencer2d_s", SEQUENCER)]
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_they_are_those_of_the_report(name: str, kwargs: dict[str, Any], device: str) -> None:
    """Attention and recurrent layers, too; and a model without weights has the same."""
    model: nn.Module = timm.create_model(name, num_classes=10, **kwargs).eval()
    expected = count_macs(model, (3, 64, 64)).total
    channels = find_channels(model.to(device), (3, 64, 64))
    assert sum(node_macs(channels.traced).values()) == expected
    assert 0 < sum(block.macs for block in find_layers(channels).blocks) < expected
    assert torch.backends.mkldnn.enabled
