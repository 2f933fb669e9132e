"""Training with frozen levels changes none of their weights, and learns the others."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from nestify.model.nested_model import NestedModel
from nestify.model.spec import describe_model
from nestify.recipe.augment_options import AugmentOptions
from nestify.recipe.levels import Level
from nestify.recipe.options import TrainOptions
from nestify.schedule.nest import choose_weights
from nestify.schedule.ramp import Ramp
from nestify.training.frozen import FrozenLevels, copy_shared, reset_unfrozen
from nestify.training.stepper import Stepper
from nestify.training.task import NestedTask, Teacher
from tests.model.test_level_sizes import narrow_model

MakeModel = Callable[..., nn.Module]
LEVELS = [Level("a", 0.9), Level("b", 0.5), Level("c", 0.0)]


def train(nested: NestedModel, frozen: int, ramp: Ramp | None = None, **options: object) -> NestedModel:
    """Train three steps of a stage: the frozen levels are not part of the loss."""
    weights = [float(k > frozen) for k in range(1, nested.n_levels + 1)]
    task = NestedTask(
        nested, nn.CrossEntropyLoss(), weights=weights, distill=[0] * len(weights), teacher=Teacher("none")
    )
    stepper = Stepper(
        task,
        TrainOptions(**{"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, **options}),
        AugmentOptions(),
        epoch_steps=3,
        total=3,
        ramp=ramp,
        score="lamp",
        frozen=frozen,
    )
    images = torch.randn(4, *nested.spec.input_size, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        stepper.step([(images, torch.arange(4))])
    return stepper.finish()


def state_of(nested: NestedModel, level: int) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in nested.at_level(level).state_dict().items()}


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lookahead_sgd"])
@pytest.mark.parametrize("more", [{}, {"clip_grad": 0.1}, {"ema_decay": 0.5}])
def test_frozen_levels_stay_bit_for_bit(opt: str, more: dict[str, object], make_model: MakeModel) -> None:
    model = make_model("test_resnet")
    nested = NestedModel(model, describe_model(model, input_size=(3, 32, 32)), ["a", "b", "c"])
    choose_weights(nested, LEVELS, "lamp")
    before = [state_of(nested, level) for level in (1, 2, 3)]
    entry = {name: tensor.clone() for name, tensor in nested.entry.items()}
    trained = train(nested, 1, Ramp(LEVELS, 2, 2, None, 1), opt=opt, **more)
    for name, tensor in state_of(trained, 1).items():
        assert torch.equal(tensor, before[0][name]), name
    for level in (2, 3):
        after = state_of(trained, level)
        new = {name: entry[name] > 1 for name in entry}
        assert all(
            not torch.equal(after[name][new[name]], before[level - 1][name][new[name]]) for name in entry
        )
    assert [round(trained.sparsity(level), 3) for level in (1, 2, 3)] == [0.9, 0.5, 0.0]


def test_tensors_without_entry_levels_are_frozen_with_the_core_level(make_model: MakeModel) -> None:
    """Layer norms, biases and position tables are shared, and belong to the core level."""
    model = make_model("test_vit", img_size=32)
    nested = NestedModel(model, describe_model(model), ["a", "b", "c"])
    choose_weights(nested, LEVELS, "lamp")
    before = state_of(nested, 2)
    assert set(nested.entry) < set(before)
    trained = train(nested, 2)
    for name, tensor in state_of(trained, 2).items():
        assert torch.equal(tensor, before[name]), name


def test_narrow_frozen_levels() -> None:
    nested = narrow_model("test_resnet")
    before, wider = state_of(nested, 1), state_of(nested, 2)
    trained = train(nested, 1)
    for name, tensor in state_of(trained, 1).items():
        assert torch.equal(tensor, before[name]), name
    assert any(not torch.equal(tensor, wider[name]) for name, tensor in state_of(trained, 2).items())


def test_other_weights_are_reset(make_model: MakeModel) -> None:
    model = make_model("test_resnet")
    nested = NestedModel(model, describe_model(model, input_size=(3, 32, 32)), ["a", "b", "c"])
    choose_weights(nested, LEVELS, "lamp")
    original = copy_shared(nested)
    with torch.no_grad():
        for name in nested.entry:
            nested.shared_tensor(name).add_(1)
    reset_unfrozen(nested, 1, original)
    for name, entry in nested.entry.items():
        assert torch.equal(nested.shared_tensor(name), original[name] + (entry == 1))


def test_frozen_weights_have_no_part_in_the_gradient(make_model: MakeModel) -> None:
    """Otherwise they would count in the norm that clipping limits, and in the optimizer's averages."""
    model = make_model("test_vit", img_size=32)
    nested = NestedModel(model, describe_model(model), ["a", "b", "c"])
    choose_weights(nested, LEVELS, "lamp")
    for name in nested.shared_tensors():
        nested.shared_tensor(name).grad = torch.ones_like(nested.shared_tensor(name))
    FrozenLevels(nested, 2).drop_gradients()
    for name in nested.shared_tensors():
        gradient = nested.shared_tensor(name).grad
        if name in nested.entry:
            assert gradient is not None
            assert torch.equal(gradient, (nested.entry[name] == 3).float())
        else:
            assert gradient is None
