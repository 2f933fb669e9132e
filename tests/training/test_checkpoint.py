"""States as tensors and JSON are restored bit by bit, and training continues identically."""

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from nestify.training.checkpoint import (
    optimizer_state,
    pack,
    restore_optimizer,
    unpack,
)
from nestify.training.random_states import random_states, set_random_states

CPU = torch.device("cpu")
plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text()
keys = st.text() | st.integers()
values = st.recursive(
    plain,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=20,
)


def round_trip(value: Any) -> Any:
    tensors: dict[str, Tensor] = {}
    return unpack(json.loads(json.dumps(pack(value, tensors, "x"))), tensors)


@given(value=values)
def test_plain_values_are_restored(value: object) -> None:
    assert repr(round_trip(value)) == repr(value)  # 1 is not True, NaN is NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_keep_their_type_and_layout(dtype: torch.dtype) -> None:
    images = torch.arange(48).reshape(2, 3, 2, 4).to(dtype)
    for tensor in (
        images,
        images.to(memory_format=torch.channels_last),
        images[0, 0, 0, 0],
        images[:0],
        images.mT,
    ):
        restored = round_trip({"a": [tensor]})["a"][0]
        assert restored.dtype == dtype
        assert torch.equal(restored, tensor)
        if tensor.is_contiguous(memory_format=torch.channels_last):
            assert restored.stride() == tensor.stride()


def test_a_packed_tensor_is_a_copy() -> None:
    tensors: dict[str, Tensor] = {}
    original = torch.zeros(3)
    pack(original, tensors, "x")
    original += 1
    assert torch.equal(tensors["x"], torch.zeros(3))


def test_values_that_no_checkpoint_can_store() -> None:
    with pytest.raises(TypeError, match=r"x\.a is a set"):
        pack({"a": {1}}, {}, "x")
    with pytest.raises(ValueError, match="not the form of a packed value"):
        unpack({"code": "import os"}, {})
    with pytest.raises(KeyError):
        unpack({"tensor": "gone", "layout": "rows"}, {})


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.random(),
        np.random.normal(),
        float(torch.rand(())),
    ]


def test_random_numbers_continue() -> None:
    draws()
    states = round_trip(random_states(CPU))
    expected = draws()
    draws()
    set_random_states(states, CPU)
    assert draws() == expected
    invalid = {**states, "numpy": (states["numpy"][0], 10**6, 0, 0.0)}
    with pytest.raises(ValueError, match="NumPy"):
        set_random_states(invalid, CPU)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)]
    return nn.Sequential(*parts).to(memory_format=torch.channels_last)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(4, 3, 8, 8, generator=generator)
        target = torch.randint(4, (4,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), target).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "name",
    ["sgd", "adamw", "lamb", "adafactor", "adafactorbv", "lookahead_adamw", "lion", "muon", "novograd"],
)
def test_optimizers_continue_bit_by_bit(name: str) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=1e-3)
        return optimizer

    model = network()
    optimizer = make(model)
    steps(model, optimizer, 0, 8)
    saved = round_trip({"model": dict(model.state_dict()), "optimizer": optimizer_state(optimizer)})
    steps(model, optimizer, 8, 20)

    other = network()
    restored = make(other)
    other.load_state_dict(saved["model"])
    restore_optimizer(restored, saved["optimizer"])
    steps(other, restored, 8, 20)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = network()
    state = optimizer_state(create_optimizer_v2(model, opt="adamw", lr=0.01))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        restore_optimizer(create_optimizer_v2(model, opt="sgd", lr=0.01), {**state, "groups": []})
