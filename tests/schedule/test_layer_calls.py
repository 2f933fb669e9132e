"""The calls of layers: their inputs give the layer's outputs, and two networks run side by side."""

import threading
from contextlib import closing

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nestify.schedule.layer_calls import layer_calls

CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3, bias=False),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "oblong": nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 2), bias=False),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2, padding=2, bias=False),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False),
    "depthwise": nn.Conv2d(4, 4, 5, groups=4, padding=2, bias=False),
    "same": nn.Conv2d(4, 6, 4, padding="same", bias=False),
    "pointwise": nn.Conv2d(4, 6, 1, bias=False),
}


def products(layer: nn.Module, x: Tensor, positions: int) -> Tensor:
    """Return the outputs (groups, images * positions, o) that the columns of a layer's only call give."""
    with closing(layer_calls(layer, x, batch_statistics=False)) as calls:
        (call,) = calls
    columns = call.columns(positions, seed=1)
    weight = call.weight.detach().reshape(call.groups, len(call.weight) // call.groups, -1)
    return columns @ weight.transpose(1, 2)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_columns_of_a_convolution_give_its_outputs(name: str) -> None:
    layer, x = CONVOLUTIONS[name], torch.randn(2, 4, 9, 8)
    out = layer(x).detach().flatten(2)  # (B, out, P)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    expected = out.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(products(layer, x, 1000), expected)


def test_columns_of_a_linear_layer_give_its_outputs() -> None:
    layer, x = nn.Linear(5, 3, bias=False), torch.randn(2, 7, 5)
    torch.testing.assert_close(products(layer, x, 1000)[0], layer(x).detach().flatten(0, 1))


def test_chosen_positions_are_positions() -> None:
    """Of 72 positions, 10 of each image are chosen, all different."""
    layer, x = CONVOLUTIONS["grouped"], torch.randn(2, 4, 9, 8)
    every, chosen = products(layer, x, 1000), products(layer, x, 10)
    assert chosen.shape == (2, 20, 3)
    found = (chosen[:, :, None] - every[:, None]).abs().amax(-1) < 1e-5  # (groups, 20, 144)
    assert found.sum(2).eq(1).all()
    places = found[0].float().argmax(1).view(2, 10)
    assert all(len(set(row.tolist())) == 10 for row in places)
    assert torch.equal(places // 72, torch.tensor([[0] * 10, [1] * 10]))


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return nn.Sequential(*layers).eval()


def test_calls_come_in_order_and_see_changed_weights() -> None:
    network, x = net(), torch.randn(4, 3, 4, 4)
    seen: dict[str, Tensor] = {}
    with closing(layer_calls(network, x, batch_statistics=False)) as calls:
        for call in calls:
            seen[call.name] = call.inputs.clone()
            if call.name == "0.weight":
                with torch.no_grad():
                    call.weight.zero_()
    assert list(seen) == ["0.weight", "3.weight", "5.weight"]
    constant = network[1](network[0].bias.detach().view(1, 4, 1, 1).expand(4, 4, 2, 2)).relu()
    torch.testing.assert_close(seen["3.weight"], constant.detach())


def test_batch_norm_can_use_the_images() -> None:
    network, x = net(), 3 + 2 * torch.randn(16, 3, 4, 4)
    with closing(layer_calls(network, x, batch_statistics=True)) as calls:
        inputs = {call.name: call.inputs for call in calls}
    values = network[0](x).detach()
    mean, deviation = values.mean((0, 2, 3), keepdim=True), values.std((0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(
        inputs["3.weight"], functional.relu((values - mean) / deviation), atol=1e-3, rtol=0
    )
    assert torch.equal(network[1].running_mean, torch.zeros(4))


def test_a_network_that_nobody_listens_to_ends() -> None:
    before = threading.active_count()
    with closing(layer_calls(net(), torch.randn(2, 3, 4, 4), batch_statistics=False)) as calls:
        next(calls)
    assert threading.active_count() == before


def test_an_error_of_the_network_is_raised_here() -> None:
    calls = layer_calls(net(), torch.randn(2, 5, 4, 4), batch_statistics=False)
    with closing(calls), pytest.raises(RuntimeError, match="channels"):
        list(calls)
