"""Compiled levels compute the same as levels that are not compiled."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from nestify.model.nested_model import NestedModel
from nestify.recipe.levels import Level
from nestify.schedule.weights import select_entry_levels
from nestify.training.forward import CompiledLevels
from tests.model.test_level_sizes import narrow_model


def masked(nested: NestedModel) -> NestedModel:
    full = NestedModel(nested.network, nested.spec, ["a", "b"])
    weights = {name: full.shared_tensor(name) for name in full.entry}
    full.set_entry_levels(select_entry_levels(weights, [Level("a", 0.8), Level("b", 0.0)]))
    return full


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["weight", "channel"])
@pytest.mark.filterwarnings("ignore")  # warnings of torch while it compiles
def test_logits_gradients_and_statistics(schedule: str) -> None:
    nested = narrow_model("test_resnet", (0.5, 1.0))
    nested = (masked(nested) if schedule == "weight" else nested).train()
    images = torch.randn(8, 3, 32, 32)
    compiled, copy = CompiledLevels(), deepcopy(nested)
    for level in (1, 2):
        expected = nested(images, level=level)
        found = compiled.run(level, *copy.view(level, images.device, lazy=False), images)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        expected.square().sum().backward()
        found.square().sum().backward()
    assert compiled.count_graphs() == 2
    state = copy.state_dict()
    for name, tensor in nested.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-3)
    for name, parameter in nested.named_parameters():
        gradient = copy.get_parameter(name).grad
        assert (gradient is None) == (parameter.grad is None), name
        if gradient is not None and isinstance(parameter, nn.Parameter):
            scale = float(parameter.grad.abs().max())  # type: ignore[union-attr]
            torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-3 * max(scale, 1))
    compiled.run(1, *copy.view(1, images.device, lazy=False), images)
    assert compiled.count_graphs() == 2
