"""Scaled gradients, compared with the gradients of single levels that are trained alone."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from nestify.model.nested_model import NestedModel
from nestify.model.spec import describe_model
from nestify.recipe.levels import Level
from nestify.schedule.weights import select_entry_levels
from nestify.training.gradients import LevelGradients
from nestify.training.task import NestedTask, Teacher
from tests.model.test_level_sizes import narrow_model

MakeModel = Callable[..., nn.Module]


def scaled_gradients(nested: NestedModel, weights: list[float]) -> dict[str, torch.Tensor]:
    """Return the scaled gradients of one step of all levels."""
    teacher = Teacher("none")
    task = NestedTask(
        nested, nn.CrossEntropyLoss(), weights=weights, distill=[0] * len(weights), teacher=teacher
    )
    images = torch.randn(4, *nested.spec.input_size, generator=torch.Generator().manual_seed(0))
    nested.zero_grad()
    task.backward(images, torch.arange(4))
    LevelGradients(nested, task.level_weights).apply()
    return {name: nested.shared_tensor(name).grad.clone() for name in nested.entry}  # type: ignore[union-attr]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [3.0, 1.5, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
def test_each_weight_gets_the_scaled_mean_over_its_levels(
    weights: list[float], make_model: MakeModel
) -> None:
    model = make_model("test_vit", img_size=32)
    nested = NestedModel(model, describe_model(model), ["a", "b", "c"])
    levels = [Level("a", 0.9), Level("b", 0.5), Level("c", 0.0)]
    tensors = {name: nested.shared_tensor(name) for name in nested.entry}
    nested.set_entry_levels(select_entry_levels(tensors, levels))
    found = scaled_gradients(nested, weights)

    alone = [scaled_gradients(nested, [float(k == level) for k in range(3)]) for level in range(3)]
    for name, gradient in found.items():
        entry = nested.entry[name]
        expected = torch.zeros_like(gradient)
        users = torch.zeros_like(gradient)
        number = torch.zeros_like(gradient)
        for level, weight in enumerate(weights, start=1):
            uses = (entry <= level).float()
            expected += weight * uses * alone[level - 1][name]
            users += weight * uses
            number += uses * (weight > 0)
        expected = torch.where(users > 0, number.sqrt() * expected / users.clamp(min=1e-9), 0.0)
        trained = sum(weight > 0 for weight in weights)
        expected *= torch.where(number < trained, 2.0, 1.0)  # where a trained level lacks the weight
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6, msg=name)


def test_narrower_levels() -> None:
    """Shared weights that only the wider level has get twice the gradient of this level trained alone."""
    nested = narrow_model("test_resnet", (0.5, 1.0))
    assert nested.level_sizes is not None
    shared = nested.shared_tensors()
    outside = {name: entry == 2 for name, entry in nested.level_sizes.entry_levels(shared).items()}
    assert sum(int(each.sum()) for each in outside.values()) > 1000

    def gradients(weights: list[float]) -> dict[str, torch.Tensor]:
        nested.eval()  # in training mode the batch-norm statistics would change between the two calls
        scaled_gradients(nested, weights)
        return {name: t.grad.clone() for name, t in shared.items() if t.grad is not None}

    both, alone = gradients([3.0, 1.0]), gradients([0.0, 1.0])
    for name in both.keys() & outside.keys():
        scale = 1 if name in nested.own_names else 2
        torch.testing.assert_close(both[name][outside[name]], scale * alone[name][outside[name]], msg=name)
