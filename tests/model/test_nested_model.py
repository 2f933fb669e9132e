"""A level of the nested model equals a plain timm model with the level's tensors."""

from collections.abc import Callable, Sequence
from copy import deepcopy

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

from nestify.errors import RecipeError, UnsupportedModelError
from nestify.file.loading import restore
from nestify.model.entry_levels import EntryLevels
from nestify.model.nested_model import NestedModel
from nestify.model.spec import describe_model
from nestify.recipe.levels import Level
from nestify.recipe.options import BatchNormMode
from nestify.schedule.weights import select_entry_levels

MakeModel = Callable[..., nn.Module]
LEVELS = [Level("core", 0.9), Level("middle", 0.6), Level("full", 0.2)]
NAMES = ["core", "middle", "full"]
# a convnet, a vision transformer, a depthwise net, and one whose modules have several names
MODELS = ["test_resnet", "test_vit", "test_efficientnet", "coat_tiny"]
SIZES = {
    "test_vit": {"img_size": 64},
    "coat_tiny": {"img_size": 32, "embed_dims": [32] * 4, "serial_depths": [1] * 4, "parallel_depth": 1},
}


def nest(model: nn.Module, levels: Sequence[Level] = LEVELS, bn: BatchNormMode = "private") -> NestedModel:
    """Return a nested model whose levels have different private tensors, as after training."""
    nested = NestedModel(model, describe_model(model), [level.name for level in levels], bn=bn)
    weights = {name: nested.shared_tensor(name) for name in nested.entry}
    nested.set_entry_levels(select_entry_levels(weights, levels))
    with torch.no_grad():
        for level in range(1, nested.n_levels + 1):
            for tensor in nested.own_tensors(level).values():
                if tensor.is_floating_point():
                    tensor.mul_(1 + 0.1 * level * torch.rand_like(tensor))
                else:
                    tensor.fill_(level)
    return nested.eval()


def images_for(nested: NestedModel, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *nested.spec.kwargs.get("img_size", (64, 64)))


def plain_level(name: str, nested: NestedModel, level: int) -> nn.Module:
    """Return the plain timm model with a level's masked weights and private tensors, set without nestify."""
    plain: nn.Module = timm.create_model(name, num_classes=10, **SIZES.get(name, {}))
    state = {key: tensor.clone() for key, tensor in nested.network.state_dict().items()}
    entry = nested.entry_levels
    for alias, kept in {**nested.spec.aliases, **{n: n for n in entry}}.items():
        if kept in entry.tensors:
            state[alias] = torch.where(entry[kept] <= level, state[alias], torch.tensor(0.0))
    for key, tensor in nested.own_tensors(level).items():
        state[key] = tensor.clone()
    plain.load_state_dict(state)
    return plain.eval()


@pytest.mark.parametrize("name", MODELS)
def test_level_equals_the_plain_model_with_its_tensors(name: str, make_model: MakeModel) -> None:
    nested = nest(make_model(name, **SIZES.get(name, {})))
    images = images_for(nested)
    seen = []
    with torch.no_grad():
        for level in (1, 2, 3):
            expected = plain_level(name, nested, level)(images)
            torch.testing.assert_close(nested(images, level=level), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(nested.at_level(level)(images), expected, rtol=0, atol=1e-5)
            seen.append(expected)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
    assert not torch.allclose(seen[1], seen[2], atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_a_level_is_the_plain_models_times_its_mask(name: str, make_model: MakeModel) -> None:
    nested = nest(make_model(name, **SIZES.get(name, {})))
    images = images_for(nested)
    for level in (1, 3):
        nested.zero_grad()
        nested(images, level=level).square().sum().backward()
        plain = plain_level(name, nested, level)
        plain(images).square().sum().backward()
        parameters = dict(plain.named_parameters())
        for weight, entry in nested.entry.items():
            grad = parameters[weight].grad
            assert grad is not None
            ours = nested.shared_tensor(weight).grad
            assert ours is not None
            torch.testing.assert_close(ours, grad * (entry <= level), rtol=1e-3, atol=1e-4)


def test_training_a_level_changes_only_its_own_statistics(make_model: MakeModel) -> None:
    nested = nest(make_model("test_resnet"))
    before = [
        {name: tensor.clone() for name, tensor in nested.own_tensors(level).items()} for level in (1, 2, 3)
    ]
    nested.train()
    nested(images_for(nested), level=2)
    for level in (1, 3):
        for name, tensor in nested.own_tensors(level).items():
            assert torch.equal(tensor, before[level - 1][name])
    changed = nested.own_tensors(2)
    assert all(
        not torch.equal(changed[name], tensor) for name, tensor in before[1].items() if "running" in name
    )


def test_plain_model_shares_no_storage(make_model: MakeModel) -> None:
    nested = nest(make_model("test_efficientnet"))
    ours = {tensor.untyped_storage().data_ptr() for tensor in nested.state_dict().values()}
    for level in (1, 3):
        plain = nested.at_level(level)
        assert not plain.training
        for tensor in plain.state_dict().values():
            assert tensor.untyped_storage().data_ptr() not in ours


def test_switching_levels_holds_at_most_one_copy(make_model: MakeModel) -> None:
    nested = nest(make_model("test_resnet"))
    images = images_for(nested)
    with torch.no_grad():
        for level in (1, 2, 3, 1):
            nested(images, level=level)
            assert nested._cached is not None
            own = {tensor.data_ptr() for tensor in nested.state_dict().values()}
            held = sum(t.numel() for t in nested._cached[1].values() if t.data_ptr() not in own)
            assert 0 < held <= sum(parameter.numel() for parameter in nested.network.parameters())


def test_a_cached_level_is_updated_after_every_change(make_model: MakeModel) -> None:
    nested = nest(make_model("test_resnet"))
    images = images_for(nested)
    with torch.no_grad():
        first = nested(images, level=1)
        nested.shared_tensor("fc.weight").mul_(2)
        second = nested(images, level=1)
        assert not torch.allclose(first, second)
        nested.set_entry_levels(EntryLevels(3, {n: torch.ones_like(e) for n, e in nested.entry.items()}))
        assert not torch.allclose(second, nested(images, level=1))
        torch.testing.assert_close(nested(images, level=1), nested.at_level(1)(images))


def test_running_average_copies_the_masks(make_model: MakeModel) -> None:
    model = make_model("test_resnet")
    nested = NestedModel(model, describe_model(model), NAMES)
    average = ModelEmaV3(nested, decay=0.5)
    weights = {name: nested.shared_tensor(name) for name in nested.entry}
    nested.set_entry_levels(select_entry_levels(weights, LEVELS))
    average.update(nested)
    averaged = average.module
    assert isinstance(averaged, NestedModel)
    plain = averaged.at_level(1)
    zeros = sum(int((plain.get_parameter(name) == 0).sum()) for name in nested.entry)
    assert zeros == nested.entry_levels.total - nested.entry_levels.count_kept(1)
    with torch.no_grad():
        images = images_for(nested)
        torch.testing.assert_close(averaged(images, level=1), plain(images))


def test_copy_is_independent_of_the_original(make_model: MakeModel) -> None:
    nested = nest(make_model("test_resnet"))
    other = deepcopy(nested)
    images = images_for(nested)
    with torch.no_grad():
        before = other(images, level=1)
        nested.set_entry_levels(EntryLevels(3, {n: torch.ones_like(e) for n, e in nested.entry.items()}))
        torch.testing.assert_close(other(images, level=1), before)


@pytest.mark.parametrize("bn", ["private", "recalibrate"])
@pytest.mark.parametrize("name", MODELS)
def test_state_rebuilds_the_same_model(name: str, bn: BatchNormMode, make_model: MakeModel) -> None:
    nested = nest(make_model(name, **SIZES.get(name, {})), bn=bn)
    fresh: nn.Module = timm.create_model(name, num_classes=10, **SIZES.get(name, {}))
    again = restore(fresh, nested.spec, nested.nested_state(), NAMES)
    images = images_for(nested)
    with torch.no_grad():
        for level in NAMES:
            assert torch.equal(again(images, level=level), nested(images, level=level))


def test_unknown_level_is_refused_with_the_known_ones(make_model: MakeModel) -> None:
    nested = nest(make_model("test_resnet"))
    with pytest.raises(RecipeError, match=r"no level 'x'; give one of 1 \(core\), 2 \(middle\), 3 \(full\)"):
        nested.level_number("x")
    with pytest.raises(RecipeError, match="no level 4; give one of"):
        nested.level_number(4)
    assert nested.level_number("2") == nested.level_number("middle") == nested.level_number(2) == 2


def test_weight_shared_by_two_modules_is_masked_in_both(make_model: MakeModel) -> None:
    model = make_model("test_vit", img_size=32)
    first, second = (model.get_submodule(f"blocks.{i}.mlp.fc1") for i in (0, 1))
    second.weight = first.weight
    nested = nest(model)
    entry = nested.entry_levels
    assert "blocks.0.mlp.fc1.weight" in entry.tensors
    assert "blocks.1.mlp.fc1.weight" not in entry.tensors
    images = torch.randn(2, 3, 32, 32)
    plain = nested.at_level(1)
    weight = plain.get_parameter("blocks.1.mlp.fc1.weight")
    assert torch.count_nonzero(weight) == entry.count_kept(1, "blocks.0.mlp.fc1.weight")
    with torch.no_grad():
        torch.testing.assert_close(nested(images, level=1), plain(images))
    torch.testing.assert_close(nested.train()(images, level=1), plain(images))


def test_several_outputs_are_refused(make_model: MakeModel) -> None:
    model = make_model("deit_tiny_distilled_patch16_224", img_size=32)
    nested = NestedModel(model, describe_model(model), NAMES).train()
    images = torch.randn(2, 3, 32, 32)
    assert nested(images).shape == (2, 10)
    model.set_distilled_training(True)
    with pytest.raises(
        UnsupportedModelError, match=r"deit_tiny_distilled.* a tuple .*set_distilled_training"
    ):
        nested(images)
