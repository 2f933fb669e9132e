"""Dropout drops features only while a level is trained."""

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from nestify.model.graph.channel_map import ChannelMap, map_channels
from tests.model.graph.builders import cut, half, load_tensors

CPU = torch.device("cpu")


class Dropping(nn.Module):
    """Features (B, 16, 4, 4) with dropout, averaged over the pixels."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.first, self.dropout, self.last = nn.Conv2d(3, 16, 1), dropout, nn.Linear(16, 16, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.dropout(self.first(images)).mean((2, 3)))
        return logits


def level(model: nn.Module, channels: ChannelMap, training: bool, images: Tensor) -> Tensor:
    axes = channels.axes(half(channels))
    skeleton = channels.skeleton(axes, training=training, device=CPU)
    with torch.no_grad():
        logits: Tensor = functional_call(skeleton, cut(channels, model, axes), (images,))
    return logits


DROPOUTS = [nn.Dropout(0.25), nn.Dropout(0.25, inplace=True), nn.Dropout2d(0.25), nn.AlphaDropout(0.25)]


@pytest.mark.parametrize("dropout", DROPOUTS, ids=str)
def test_features_are_dropped_only_in_training(dropout: nn.Module) -> None:
    model = Dropping(dropout)
    channels = map_channels(model, (3, 4, 4))
    images = torch.randn(5, 3, 4, 4)
    same = level(model, channels, False, images)
    assert torch.equal(level(model, channels, False, images), same)
    first, second = (level(model, channels, True, images) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, same)


def test_kept_features_are_scaled_by_the_dropout_rate_of_the_model() -> None:
    """Each channel is either 0 or 4 / 3 of its value without dropout, and a quarter is 0."""
    model = Dropping(nn.Dropout2d(0.25))
    nn.init.eye_(model.last.weight)
    channels = map_channels(model, (3, 4, 4))
    images = torch.randn(200, 3, 4, 4)
    kept = [np.arange(group.units) for group in channels.groups]
    with torch.no_grad():
        features = model.eval()(images)
    skeleton = channels.skeleton(channels.axes(kept), training=True, device=CPU)
    network = load_tensors(skeleton, cut(channels, model, channels.axes(kept)))
    with torch.no_grad():
        found = network(images)
    dropped = found == 0
    torch.testing.assert_close(found[~dropped], features[~dropped] * 4 / 3)
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.05)  # 3200 draws: 6 standard deviations


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_timm_model_with_a_drop_rate(name: str) -> None:
    model = timm.create_model(name, num_classes=10, drop_rate=0.5, drop_path_rate=0.5)
    channels = map_channels(model, (3, 64, 64))
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        calls = {
            training: [level(model, channels, training, images) for _ in range(2)]
            for training in (False, True)
        }
    assert torch.equal(*calls[False])
    assert not torch.equal(*calls[True])
