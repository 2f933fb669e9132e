"""MACs of complete models compared with torch's FLOP counter, and effective MACs with brute force."""

import itertools
import random

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nestify.errors import UnsupportedModelError
from nestify.schedule.costs import MacCount, count_macs, effective_macs, layer_entries

TINY = {
    "test_resnet": {},
    "test_vit": {"img_size": 64},
    "test_efficientnet": {},
    "test_byobnet": {},
    "test_convnext": {},
    "test_nfnet": {},
    "test_mambaout": {},
}


@pytest.mark.parametrize("name", TINY)
def test_timm_models_against_torchs_counter(name):
    model = timm.create_model(name, **TINY[name]).eval()
    count = count_macs(model, (3, 64, 64))
    # torch's counter does not know fused attention on a CPU, but it does know matrix products.
    math = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), math, FlopCounterMode(display=False) as flops:
        model(torch.zeros(1, 3, 64, 64))
    assert count.total == pytest.approx(flops.get_total_flops() / 2, rel=1e-3)
    assert not count.uncounted
    attributed = sum(count.by_weight.values())
    assert attributed == count.total if name != "test_vit" else 0 < attributed < count.total
    by_module = {module: sum(counts.values()) // 2 for module, counts in flops.get_flop_counts().items()}
    assert {weight: macs for weight, macs in count.by_weight.items() if macs} == {
        f"{module}.weight": by_module[f"{type(model).__name__}.{module}"]
        for module, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }


def executed_by_a_skipping_kernel(layer: nn.Conv2d | nn.Linear, side: int) -> int:
    """Count the multiplications by a non-zero weight one by one; the layer has no padding."""
    macs = 0
    positions = [()]
    if isinstance(layer, nn.Conv2d):
        positions = itertools.product(range(0, side - layer.kernel_size[0] + 1, layer.stride[0]), repeat=2)
    for _, weight in itertools.product(positions, layer.weight.flatten().tolist()):
        macs += weight != 0
    return macs


@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_effective_macs_by_brute_force(seed, share):
    draw = random.Random(seed)
    conv, fc = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(16, 5)
    kept = {}
    for name, layer in {"0.weight": conv, "2.weight": fc}.items():
        zero = torch.tensor([draw.random() < share for _ in range(layer.weight.numel())])
        layer.weight.data.fill_(1).masked_fill_(zero.view_as(layer.weight), 0)
        kept[name] = (int((~zero).sum()), zero.numel())
    count = count_macs(nn.Sequential(conv, nn.Flatten(), fc), (3, 6, 6))
    densities = {name: used / weights for name, (used, weights) in kept.items()}
    expected = [executed_by_a_skipping_kernel(conv, side=6), executed_by_a_skipping_kernel(fc, side=1)]
    assert effective_macs(count, densities) == sum(expected)
    rows = layer_entries(count, {name: (used, n, n) for name, (used, n) in kept.items()})
    assert [row.effective_macs for row in rows] == expected
    assert [row.dense_macs for row in rows] == [4 * 4 * 27, 5 * 16]
    assert [(row.name, (row.kept, row.weights)) for row in rows] == list(kept.items())


COUNT = MacCount(
    total=1000, by_weight={"a": 600, "b": 300, "c": 0}, not_skippable=frozenset({"b"}), uncounted={}
)


@pytest.mark.parametrize(
    ("densities", "macs"),
    [
        ({}, 1000),
        ({"a": 1.0}, 1000),
        ({"a": 0.5}, 700),
        ({"a": 0.0}, 400),
        ({"a": 1 / 3}, 600),
        ({"b": 0.0}, 1000),
        ({"a": 0.5, "b": 0.5, "c": 0.5}, 700),
    ],
)
def test_effective_macs_skip_only_skippable_weights(densities, macs):
    assert effective_macs(COUNT, densities) == macs


def test_a_weight_of_another_model_is_an_error():
    with pytest.raises(KeyError, match="d"):
        effective_macs(COUNT, {"d": 0.5})
    with pytest.raises(KeyError, match="d"):
        layer_entries(COUNT, {"d": (1, 2, 2)})


def test_the_macs_of_a_smaller_level_are_those_of_the_weights_that_it_has():
    entries = layer_entries(COUNT, {"a": (20, 40, 80), "b": (10, 20, 80), "d": (0, 0, 80)})
    assert [(row.dense_macs, row.effective_macs) for row in entries] == [(600, 300), (300, 300), (0, 0)]
    assert [(row.kept, row.weights) for row in entries] == [(20, 80), (10, 80), (0, 80)]


class Restless(nn.Module):
    """A model that changes itself and the random state when it runs, and fails on small images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4).eval()
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        x = self.norm(self.conv(x)) + torch.rand(())
        if x.shape[-1] < 4:
            raise RuntimeError("too small")
        return x


@pytest.mark.parametrize("side", [8, 2])
def test_counting_does_not_change_the_model(side, capfd, caplog):
    model = Restless()
    model.conv(torch.zeros(1, 3, 4, 4)).sum().backward()
    model.conv.weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    if side == 2:
        with pytest.raises(UnsupportedModelError, match=r"Restless .*\(3, 2, 2\).*RuntimeError: too small"):
            count_macs(model, (3, side, side))
    else:
        assert count_macs(model, (3, side, side)).total == 64 * 12
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes == [True, True, False]
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True]
    assert [parameter.grad is None for parameter in model.parameters()] == [False, False, True, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_counts_in_the_precision_of_the_model():
    assert count_macs(nn.Conv2d(3, 4, 1).to(torch.bfloat16), (3, 2, 2)).total == 4 * 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", TINY)
def test_counts_on_a_gpu_equal_those_on_a_cpu(name):
    model = timm.create_model(name, **TINY[name])
    expected = count_macs(model, (3, 64, 64))
    random_state = torch.cuda.get_rng_state()
    assert count_macs(model.cuda(), (3, 64, 64)) == expected
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
