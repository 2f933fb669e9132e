"""What candidates share with the original network is computed once, and changes no result."""

from collections.abc import Iterator

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nestify.compression.candidates import (
    Change,
    Probe,
    narrower_networks,
    shallower_networks,
    sparse_layers,
    whole_network,
)
from nestify.compression.shared_prefix import SharedPrefix, can_share
from nestify.model.spec import ModelSpec, describe_model
from nestify.schedule.blocks import Removable, find_removable
from nestify.schedule.costs import count_macs
from nestify.schedule.nest import order_channels

SIDE = 32


class Counted(TorchDispatchMode):
    """Counts convolutions."""

    convolutions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.convolutions += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, ModelSpec, Removable]:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, layers=[2, 2, 2, 2], zero_init_last=False)
    model(torch.randn(32, 3, SIDE, SIDE))  # statistics of some images
    spec = describe_model(model.eval(), (3, SIDE, SIDE))
    removable = find_removable(model, spec)
    order_channels(model, removable)
    return model, spec, removable


def measure_all(probe: Probe, spec: ModelSpec, removable: Removable) -> Iterator[Change]:
    count = count_macs(probe.network, spec.input_size)
    yield from sparse_layers(probe, spec.maskable, (0.5, 0.9), count)
    for candidate in (*narrower_networks(removable, (0.5,), 8), *shallower_networks(removable)):
        yield candidate.measure(probe, spec, count)


def test_every_candidate_is_measured_as_from_the_start(
    network: tuple[nn.Module, ModelSpec, Removable],
) -> None:
    model, spec, removable = network
    images = torch.randn(3, 16, 3, SIDE, SIDE)
    graph = whole_network(model, removable)
    assert can_share(graph)
    target = torch.randint(10, (16,))
    found = []
    for given in (None, graph):
        probe = Probe(model, images[0], images[1], target, given)
        with Counted() as counted:
            found.append(list(measure_all(probe, spec, removable)))
        found.append(counted.convolutions)  # type: ignore[arg-type]
    slow, many, fast, few = found
    assert [(change.kind, change.name, change.amount) for change in slow] == [
        (change.kind, change.name, change.amount) for change in fast
    ]
    for one, other in zip(slow, fast, strict=True):
        assert other.measured.divergence == pytest.approx(one.measured.divergence, rel=0.02, abs=1e-5), one
    assert few < 0.75 * many  # type: ignore[operator]


def test_passes_in_any_order_return_what_the_networks_do(
    network: tuple[nn.Module, ModelSpec, Removable],
) -> None:
    model, _, removable = network
    images = torch.randn(4, 3, SIDE, SIDE)
    graph = whole_network(model, removable)
    shared = SharedPrefix(graph, images, batch_statistics=False)
    for name in ("layer3.0.conv1.weight", "layer1.0.conv1.weight", "fc.weight", "conv1.0.weight"):
        changed = whole_network(model, removable)
        with torch.no_grad():
            changed.state_dict()[name].mul_(0.5)
            torch.testing.assert_close(shared.run(changed), changed(images), rtol=0, atol=0)
            assert not torch.equal(shared.run(changed), graph(images))
    with torch.no_grad():
        assert torch.equal(shared.run(graph), graph(images))
