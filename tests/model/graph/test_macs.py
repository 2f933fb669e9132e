"""MACs of operators agree with closed formulas."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from nestify.model.graph.block_map import map_blocks
from nestify.model.graph.channel_map import map_channels
from nestify.model.graph.macs import find_formula, node_macs
from nestify.schedule.costs import count_macs
from tests.model.graph.block_builders import Net, map_model


def test_macs_of_convolutions_and_of_a_linear_layer() -> None:
    channels, layers = map_model(Net(["gamma", "two"]))
    assert [block.macs for block in layers.blocks] == [64 * 4 * 4 * 9, 64 * 4 * 4 * 10]
    assert list(node_macs(channels.traced).macs.values()) == [
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
    ("name", "kwargs"),
    [
        ("test_vit", {"img_size": 64}),
        ("test_resnet", {}),
        pytest.param("sequencer2d_s", SEQUENCER, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_they_agree_with_the_report(name: str, kwargs: dict[str, Any], device: str) -> None:
    """This includes attention and recurrent layers, and models on the meta device."""
    model: nn.Module = timm.create_model(name, num_classes=10, **kwargs).eval()
    expected = count_macs(model, (3, 64, 64)).total
    channels = map_channels(model.to(device), (3, 64, 64))
    assert sum(node_macs(channels.traced).macs.values()) == expected
    assert 0 < sum(block.macs for block in map_blocks(channels).blocks) < expected
    assert torch.backends.mkldnn.enabled


class Attention(nn.Module):
    """Self-attention of 2 heads over the pixels, with a residual addition, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 5)

    def mix(self, x: Tensor) -> Tensor:
        heads = x.flatten(2).unflatten(1, (2, 2)).transpose(2, 3)  # (B, 2 heads, 64 tokens, 2 features)
        mixed = functional.scaled_dot_product_attention(heads, heads, heads)
        return mixed.transpose(2, 3).reshape_as(x)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = x + self.mix(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


ATTENTION_MACS = 2 * 64 * 64 * (2 + 2)


def test_attention_in_closed_form() -> None:
    channels, layers = map_model(Attention())
    counted = node_macs(channels.traced)
    assert sum(counted.macs.values()) == 64 * 4 * 3 + ATTENTION_MACS + 5 * 4
    assert not counted.uncounted
    assert [block.macs for block in layers.blocks] == [ATTENTION_MACS]


KERNELS = sorted(
    name
    for name in {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    if name.startswith("aten::_scaled_dot_product") and not name.endswith("_backward")
)


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_in_closed_form_by_every_kernel(kernel: str) -> None:
    """The formula covers the kernels of all devices, of which this machine runs only one."""
    formula = find_formula(kernel.removeprefix("aten::"))
    assert formula is not None
    query, key, value = torch.ones(1, 2, 64, 2), torch.ones(1, 2, 9, 2), torch.ones(1, 2, 9, 3)
    products = formula([query, key, value, None, 0.0], torch.ones(1, 2, 64, 3))
    assert sum(product.macs for product in products) == 2 * 64 * 9 * (2 + 3)


class Fourier(Attention):
    """A network with an operator that is unknown to the counter in place of attention."""

    def mix(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x).real


def test_an_unknown_operator_is_named_and_its_block_is_found() -> None:
    channels, layers = map_model(Fourier())
    assert node_macs(channels.traced).uncounted == {"aten::fft_fft2": 1}
    assert layers.uncounted == {"aten::fft_fft2": 1}
    assert [(block.name, block.macs) for block in layers.blocks] == [("#1", 0)]
