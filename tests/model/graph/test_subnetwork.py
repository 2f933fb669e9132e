"""Narrower networks agree with timm's narrower models, or with its full model with zeroed channels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from nestify.model.graph.channel_map import map_channels
from nestify.model.spec import state_tensors
from tests.model.graph.builders import (
    MODELS,
    NAMES,
    cut,
    difference,
    example,
    half,
    load_tensors,
    narrow,
    random_units,
    run_level,
    zero_units,
)

NARROWER: dict[str, dict[str, Any]] = {
    "test_resnet": {"channels": (16, 24, 24, 48), "stem_width": 8},
    "test_vit": {"embed_dim": 32, "num_heads": 1},
    "test_convnext": {"dims": (12, 16, 24, 32)},
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "num_heads": (1, 2)},
    "densenet121": {"growth_rate": 4},
}
"""Arguments for a timm model of half the width."""
CPU = torch.device("cpu")


def timm_of_half_width(name: str, tensors: dict[str, Tensor]) -> nn.Module:
    """Make timm's model of half the width with the tensors of a level, in evaluation mode."""
    model: nn.Module = timm.create_model(name, num_classes=10, **MODELS[name][1] | NARROWER[name])
    left = model.double().load_state_dict(tensors, strict=False)
    assert not left.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in left.missing_keys)
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_a_level_with_all_units_has_the_logits_of_the_model(name: str) -> None:
    case = example(name)
    every = [np.arange(group.units) for group in case.channels.groups]
    with torch.no_grad():
        assert case.error(run_level(case.channels, case.model, every, case.images)) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_dropping_equals_zeroing_in_groups_that_are_not_mixed(name: str) -> None:
    case = example(name)
    prefix = [
        np.arange(max(1, group.units // 2)) if k in case.unmixed else np.arange(group.units)
        for k, group in enumerate(case.channels.groups)
    ]
    scattered = [random_units(case.channels, seed, case.unmixed) for seed in range(2)]
    for kept in (prefix, *scattered):
        expected = zero_units(case.channels, case.model, kept)(case.images)
        assert difference(run_level(case.channels, case.model, kept, case.images), expected) < 1e-10
        assert case.error(expected) > 1e-6, "nothing was dropped"


@torch.no_grad()
@pytest.mark.parametrize("name", NARROWER)
@pytest.mark.parametrize("scattered", [False, True])
def test_a_level_has_the_logits_of_the_narrower_timm_model(name: str, scattered: bool) -> None:
    case = example(name)
    rng = np.random.default_rng(0)
    kept = half(case.channels)
    if scattered:
        kept = [np.sort(rng.permutation(g.units)[: g.units // 2]) for g in case.channels.groups]
    tensors = cut(case.channels, case.model, case.channels.axes(kept))
    expected = timm_of_half_width(name, tensors)(case.images)
    found = run_level(case.channels, case.model, kept, case.images)
    if name == "test_vit":  # timm scales the attention of a narrower model by the same head_dim
        assert timm_of_half_width(name, tensors).blocks[0].attn.head_dim == 32  # type: ignore[index]
    assert difference(found, expected) < 1e-10 * case.spread


@pytest.mark.parametrize("name", NAMES)
def test_half_the_width_has_about_a_quarter_of_the_macs(name: str) -> None:
    case = example(name)
    skeleton = narrow(case.channels, [np.arange(max(1, g.units // 2)) for g in case.channels.groups])
    shapes = {key: tensor.shape for key, tensor in skeleton.state_dict().items()}
    skeleton.load_state_dict({k: torch.zeros(s, dtype=torch.float64) for k, s in shapes.items()}, assign=True)
    assert flops(skeleton, case.images) < 0.4 * flops(case.model, case.images)


@torch.no_grad()
def flops(module: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(images)
    return int(counter.get_total_flops())


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.long), 7])
@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224", "resnext50_32x4d"])
def test_a_level_accepts_any_number_of_images(name: str, batch: int) -> None:
    case = example(name)
    kept = half(case.channels)
    images = case.images[[k % 3 for k in range(batch)]]
    together = run_level(case.channels, case.model, kept, images)
    alone = torch.cat([run_level(case.channels, case.model, kept, image[None]) for image in images])
    assert difference(together, alone) < 1e-10 * case.spread


@pytest.mark.parametrize("name", NARROWER)
def test_only_kept_weights_have_gradients(name: str) -> None:
    """The gradients of kept weights are those of timm's narrower model, and 0 elsewhere."""
    case = example(name)
    kept = [np.arange(g.units)[g.units - g.units // 2 :] for g in case.channels.groups]
    axes = case.channels.axes(kept)
    tensors = cut(case.channels, case.model, axes)
    reference = timm_of_half_width(name, tensors)
    reference(case.images).square().sum().backward()
    skeleton = case.channels.skeleton(axes, training=False, device=CPU)
    functional_call(skeleton, tensors, (case.images,)).square().sum().backward()
    shared = state_tensors(case.model)
    largest = max(float(p.grad.abs().max()) for p in reference.parameters() if p.grad is not None)
    for key, parameter in reference.named_parameters():
        grad, full = shared[key].grad, torch.zeros_like(shared[key])
        assert (grad is None) == (parameter.grad is None)
        if grad is not None and parameter.grad is not None:
            places = [torch.tensor(axes.get(key, {}).get(d, np.arange(n))) for d, n in enumerate(full.shape)]
            full[torch.meshgrid(*places, indexing="ij")] = parameter.grad
            assert difference(grad, full) < 1e-9 * largest
            assert not grad[full == 0].any()
    case.model.zero_grad()


@pytest.mark.parametrize("width", ["full", "half"])
def test_training_normalises_with_the_batch_as_timm_does(width: str) -> None:
    case = example("test_resnet")
    kept = half(case.channels) if width == "half" else [np.arange(g.units) for g in case.channels.groups]
    axes = case.channels.axes(kept)
    tensors = {key: tensor.detach().clone() for key, tensor in cut(case.channels, case.model, axes).items()}
    reference: nn.Module = timm.create_model(
        "test_resnet", num_classes=10, **NARROWER["test_resnet"] if width == "half" else {}
    )
    reference.double().load_state_dict(tensors, strict=False)
    skeleton = case.channels.skeleton(axes, training=True, device=CPU)
    found = functional_call(skeleton, tensors, (case.images,))
    assert difference(found, reference.train()(case.images)) < 1e-10 * case.spread
    state = reference.state_dict()
    statistics = [key for key in tensors if "running" in key]
    assert len(statistics) > 20
    for key in statistics:
        assert difference(tensors[key], state[key]) < 1e-10
        assert difference(tensors[key], cut(case.channels, case.model, axes)[key]) > 1e-3


def test_a_network_can_be_filled_with_a_state_dict() -> None:
    case = example("test_efficientnet")
    kept = half(case.channels)
    tensors = cut(case.channels, case.model, case.channels.axes(kept))
    network = load_tensors(narrow(case.channels, kept), tensors)
    assert set(network.state_dict()) == set(case.channels.names)
    expected = run_level(case.channels, case.model, kept, case.images)
    assert torch.equal(network(case.images), expected)
    again: Callable[[Tensor], Tensor] = torch.export.export(network, (case.images,), strict=False).module()
    assert difference(again(case.images), expected) < 1e-10


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_constants_are_on_the_device(device: str) -> None:
    """Swin masks its shifted windows by constants."""
    case = example("swin_tiny_patch4_window7_224")
    axes = case.channels.axes(half(case.channels))
    skeleton = case.channels.skeleton(axes, training=False, device=torch.device(device))
    own = dict(skeleton.named_buffers())
    constants = {name for name in own if name not in case.channels.names}
    assert constants
    assert {own[name].device.type for name in constants} == {device}
    tensors = {name: t.to(device) for name, t in cut(case.channels, case.model, axes).items()}
    logits = functional_call(skeleton, tensors, (case.images.to(device),))
    assert logits.device.type == device


class Factories(nn.Module):
    """Adds a tensor made in forward, with as many channels as the features, to the features."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images.mean((1, 2)))
        ramp = torch.arange(features.shape[0], device=images.device)[:, None] * torch.ones(
            8, device=images.device
        )
        logits: Tensor = self.last(features + ramp)
        return logits


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_made_in_forward_are_on_the_device(device: str) -> None:
    model = Factories()
    channels = map_channels(model, (2, 3, 4))
    assert [group.units for group in channels.groups] == [8]
    axes = channels.axes([np.arange(3)])
    skeleton = channels.skeleton(axes, training=False, device=torch.device(device))
    tensors = {name: tensor.to(device) for name, tensor in cut(channels, model, axes).items()}
    images = torch.ones(5, 2, 3, 4, device=device)
    logits = functional_call(skeleton, tensors, (images,))
    assert logits.shape == (5, 2)
    assert logits.device.type == device
