"""Layers that the small timm models lack: permuted, and with dropped units compared with zeroed units."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nestify.model.graph.channel_map import map_channels, permute_channels
from tests.model.graph.builders import difference, random_units, run_level, zero_units

WIDTH = 16


class Layer(nn.Module):
    """A layer between a convolution to `WIDTH` channels and a classifier; images are (B, 3, 8, 8)."""

    out = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.last = nn.Linear(self.out, 10)

    def layer(self, features: Tensor) -> Tensor:
        """Compute (B, out, H, W) from (B, WIDTH, 8, 8)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.layer(self.first(images)).mean((2, 3)))
        return logits


class Lstm(Layer):
    """An LSTM; one tensor has the initial states of all layers and directions, so they share 12 units."""

    out = 24

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 12, num_layers=2, bidirectional=True, batch_first=True)

    def layer(self, features: Tensor) -> Tensor:
        out, _ = self.lstm(features.flatten(2).transpose(1, 2))
        return out.transpose(1, 2).unsqueeze(-1)


class Transposed(Layer):
    out = 12

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(WIDTH, 12, 3, stride=2, groups=groups)

    def layer(self, features: Tensor) -> Tensor:
        return self.conv(features)


class TransposedInGroups(Transposed):
    def __init__(self) -> None:
        super().__init__(groups=4)


class Grouped(Layer):
    """8 groups of 2 channels that are dropped as units; then 2 groups of 16 that lose the same channels."""

    out = 8

    def __init__(self) -> None:
        super().__init__()
        self.many = nn.Conv2d(WIDTH, 32, 3, groups=8)
        self.few = nn.Conv2d(32, 8, 3, groups=2)

    def layer(self, features: Tensor) -> Tensor:
        return self.few(self.many(features))


class Attention(Layer):
    """Attention of 4 heads of 8 channels; each of 2 heads of keys and values is shared by two queries."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Conv2d(WIDTH, 32, 1)
        self.both = nn.Conv2d(WIDTH, 32, 1)
        self.proj = nn.Conv2d(32, WIDTH, 1)

    def layer(self, features: Tensor) -> Tensor:
        q = self.queries(features).flatten(2).unflatten(1, (4, 8)).transpose(2, 3)
        k, v = self.both(features).flatten(2).unflatten(1, (2, 2, 8)).transpose(3, 4).unbind(1)
        out = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.proj(out.transpose(2, 3).flatten(1, 2).unflatten(2, (8, 8)))


class OneHead(Layer):
    """Attention of one head, which may lose channels and keeps the scale of the full head."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Conv2d(WIDTH, 2 * WIDTH, 1)

    def layer(self, features: Tensor) -> Tensor:
        q, k = self.both(features).flatten(2).transpose(1, 2).unsqueeze(1).chunk(2, -1)
        v = features.flatten(2).transpose(1, 2).unsqueeze(1)
        out = functional.scaled_dot_product_attention(q, k, v)
        return out.squeeze(1).transpose(1, 2).unsqueeze(-1)


class Embedded(Layer):
    """Adds rows of a table, indexed by pixel, to the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, WIDTH)

    def layer(self, features: Tensor) -> Tensor:
        places = torch.arange(64, device=features.device)
        return features + self.table(places).T.unflatten(1, (8, 8))


class BatchNorms(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH)
        self.instance = nn.InstanceNorm2d(WIDTH, affine=True)

    def layer(self, features: Tensor) -> Tensor:
        return self.instance(self.norm(features))


class Matrices(Layer):
    """Mixes channels by products of activations, and by a parameter that is not in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def layer(self, features: Tensor) -> Tensor:
        flat = features.flatten(2)
        gram = flat @ flat.transpose(1, 2) / 64
        return torch.einsum("oc,bcn->bon", self.mix, gram @ flat).unsqueeze(-1)


class Resized(Layer):
    def layer(self, features: Tensor) -> Tensor:
        up = functional.interpolate(features, scale_factor=2, mode="bilinear")
        return functional.avg_pool2d(functional.max_pool2d(up, 2), 2)


class Unfolded(Layer):
    """Unfolds every channel into 2 x 2 pixels, and folds them again."""

    def layer(self, features: Tensor) -> Tensor:
        columns = functional.unfold(features, 2, stride=2).relu()
        return functional.fold(columns, (8, 8), 2, stride=2)


class Kernel(Layer):
    """A convolution along the channels, which ties all of them, so that there is no group."""

    def layer(self, features: Tensor) -> Tensor:
        gains = features.mean((2, 3)).unsqueeze(1)
        kernel = torch.ones(1, 1, 3, dtype=features.dtype, device=features.device)
        return features * functional.conv1d(gains, kernel, padding=1).sigmoid().transpose(1, 2).unsqueeze(-1)


LAYERS: dict[type[Layer], list[int]] = {
    Lstm: [16, 12],
    Transposed: [16, 12],
    TransposedInGroups: [4],
    Grouped: [4, 4],
    Attention: [16, 16, 2],
    OneHead: [16, 16],
    Embedded: [16],
    BatchNorms: [16],
    Matrices: [16, 16],
    Resized: [16],
    Unfolded: [16],
    Kernel: [],
}
"""Layer -> number of units of each group."""


@torch.no_grad()
@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(layer, id=layer.__name__, marks=pytest.mark.long if layer is Lstm else ())
        for layer in LAYERS
    ],
)
def test_layers(layer: type[Layer]) -> None:
    model = layer().double().eval()
    for name, tensor in model.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    channels = map_channels(model, (3, 8, 8))
    assert not channels.unknown
    assert [group.units for group in channels.groups] == LAYERS[layer]
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    logits = model(images)
    permuted = deepcopy(model)
    permute_channels(permuted, channels, [np.arange(group.units)[::-1] for group in channels.groups])
    assert difference(permuted(images), logits) < 1e-12
    unmixed = [k for k, group in enumerate(channels.groups) if not group.mixed]
    assert unmixed or not channels.groups
    for seed in range(3):
        kept = random_units(channels, seed, unmixed)
        expected = zero_units(channels, model, kept)(images)
        assert difference(run_level(channels, model, kept, images), expected) < 1e-12
