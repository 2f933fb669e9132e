"""The logits of a model do not depend on the order of its groups' units."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nestify.model.graph.channel_map import permute_channels
from tests.model.graph.builders import NAMES, example


@pytest.mark.parametrize("name", NAMES)
def test_a_permutation_of_every_group_keeps_the_logits(name: str) -> None:
    case = example(name)
    rng = np.random.default_rng(0)
    backwards = [np.arange(group.units)[::-1] for group in case.channels.groups]
    for orders in (backwards, [rng.permutation(order) for order in backwards]):
        model = deepcopy(case.model)
        permute_channels(model, case.channels, orders)
        with torch.no_grad():
            assert case.error(model(case.images)) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_members_of_groups_change(name: str) -> None:
    case = example(name)
    model = deepcopy(case.model)
    permute_channels(model, case.channels, [np.arange(g.units)[::-1] for g in case.channels.groups])
    before, after = case.model.state_dict(), model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    members = {member.name for group in case.channels.groups for member in group.members}
    assert moved == members & set(case.channels.names)


@pytest.mark.parametrize("name", NAMES)
def test_every_member_is_needed(name: str) -> None:
    """A permutation without one of the tensors changes the logits."""
    case = example(name)
    rng = np.random.default_rng(0)
    for group in case.channels.groups:
        members = [m for m in group.members if m.name in case.channels.names]
        left_out = members[rng.integers(len(members))]
        partial: Any = SimpleNamespace(
            groups=[replace(group, members=tuple(m for m in members if m is not left_out))]
        )
        model = deepcopy(case.model)
        permute_channels(model, partial, [np.roll(np.arange(group.units), 1)])
        with torch.no_grad():
            assert case.error(model(case.images)) > 1e-6, left_out.name


def test_a_unit_moves_to_its_position_in_the_order() -> None:
    case = example("test_vit")
    heads = next(g for g in case.channels.groups if g.members[0].name == "blocks.0.attn.qkv.weight")
    assert heads.units == 2
    model = deepcopy(case.model)
    orders = [np.arange(g.units)[::-1] if g is heads else np.arange(g.units) for g in case.channels.groups]
    permute_channels(model, case.channels, orders)
    before = case.model.get_parameter("blocks.0.attn.qkv.weight").view(3, 2, 32, 64)
    after = model.get_parameter("blocks.0.attn.qkv.weight").view(3, 2, 32, 64)
    assert torch.equal(after, before.flip(1))


@pytest.mark.parametrize("order", [[0, 0], [0], [0, 1, 2], [0, 2]])
def test_an_order_that_is_not_a_permutation_is_refused(order: list[int]) -> None:
    case = example("test_vit")
    orders = [np.array(order) if g.units == 2 else np.arange(g.units) for g in case.channels.groups]
    with pytest.raises(ValueError, match="not a permutation of 2 units"):
        permute_channels(deepcopy(case.model), case.channels, orders)
