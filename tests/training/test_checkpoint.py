"""States as tensors and JSON: what comes back is what went in, to the bit, and trains on alike."""

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
    random_states,
    restore_optimizer,
    set_random_states,
    unpack,
)

plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text()
keys = st.text() | st.integers()
values = st.recursive(
    plain,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=20,
)


def there_and_back(value: Any) -> Any:
    tensors: dict[str, Tensor] = {}
    return unpack(json.loads(json.dumps(pack(value, tensors, "x"))), tensors)


@given(value=values)
def test_any_plain_value(value: object) -> None:
    assert repr(there_and_back(value)) == repr(value)  # 1 is not True, NaN is NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_keep_their_type_and_layout(dtype: torch.dtype) -> None:
    whole = torch.arange(48).reshape(2, 3, 2, 4).to(dtype)
    for tensor in (
        whole,
        whole.to(memory_format=torch.channels_last),
        whole[0, 0, 0, 0],
        whole[:0],
        whole.mT,
    ):
        back = there_and_back({"a": [tensor]})["a"][0]
        assert back.dtype == dtype
        assert torch.equal(back, tensor)
        if tensor.is_contiguous(memory_format=torch.channels_last):
            assert back.stride() == tensor.stride()


def test_a_packed_tensor_does_not_change_with_its_origin() -> None:
    tensors: dict[str, Tensor] = {}
    origin = torch.zeros(3)
    pack(origin, tensors, "x")
    origin += 1
    assert torch.equal(tensors["x"], torch.zeros(3))


def test_what_no_checkpoint_can_hold() -> None:
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


def test_random_numbers_go_on() -> None:
    draws()
    states = there_and_back(random_states())
    expected = draws()
    draws()
    set_random_states(states)
    assert draws() == expected
    spoilt = {**states, "numpy": (states["numpy"][0], 10**6, 0, 0.0)}
    with pytest.raises(ValueError, match="NumPy"):
        set_random_states(spoilt)


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
def test_optimizers_go_on_to_the_bit(name: str) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=1e-3)
        return optimizer

    model = network()
    optimizer = make(model)
    steps(model, optimizer, 0, 8)
    kept = there_and_back({"model": dict(model.state_dict()), "optimizer": optimizer_state(optimizer)})
    steps(model, optimizer, 8, 20)

    other = network()
    again = make(other)
    other.load_state_dict(kept["model"])
    restore_optimizer(again, kept["optimizer"])
    steps(other, again, 8, 20)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = network()
    state = optimizer_state(create_optimizer_v2(model, opt="adamw", lr=0.01))
    with pytest.raises(ValueError, match="other groups"):
        restore_optimizer(create_optimizer_v2(model, opt="sgd", lr=0.01), {**state, "groups": []})
