"""Levels that predict their own set of classes equal plain models with such classifiers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import nestify
from nestify.errors import BadFileError, UnsupportedModelError
from nestify.file.manifest import ClassMap
from nestify.file.reader import open_nested_file
from nestify.file.slicing import slice_file
from nestify.file.writer import write_nested_file
from nestify.model.heads import coarse_rows, head_names
from nestify.model.nested_model import NestedModel
from nestify.model.spec import describe_model
from nestify.recipe.levels import Level
from nestify.schedule.weights import select_entry_levels
from tests.file.builders import description
from tests.model.test_level_sizes import SIDE, narrow_model

MakeModel = Callable[..., nn.Module]
PARENTS = [0, 1, 1, 2, 0, 2, 2, 0, 1, 2]
COARSE = [3, 10, 10]
MODELS: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_vit": {"img_size": 64},
    "test_efficientnet": {},
    "levit_128s": {"embed_dim": [32, 48, 64], "num_heads": [2, 3, 4], "depth": [1, 1, 1]},
}


def nest(model: nn.Module) -> NestedModel:
    spec = describe_model(model)
    nested = NestedModel(model, spec, ["a", "b", "c"], classes=COARSE)
    levels = [Level("a", 0.8), Level("b", 0.5), Level("c", 0.2)]
    weights = {name: nested.shared_tensor(name) for name in nested.entry}
    nested.set_entry_levels(select_entry_levels(weights, levels))
    with torch.no_grad():
        for level in (1, 2):
            for tensor in nested.own_tensors(level).values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand_like(tensor) + 0.5)
    return nested.eval()


def images(nested: NestedModel) -> torch.Tensor:
    side = 224 if "levit" in nested.spec.architecture else 64
    return torch.randn(2, 3, side, side)


@pytest.mark.parametrize("name", MODELS)
def test_level_equals_the_plain_model_with_its_number_of_classes(name: str, make_model: MakeModel) -> None:
    nested = nest(make_model(name, **MODELS[name]))
    batch = images(nested)
    for level, classes in enumerate(COARSE, start=1):
        plain = timm.create_model(name, **{**MODELS[name], "num_classes": classes}).eval()
        state = {key: tensor.clone() for key, tensor in nested.network.state_dict().items()}
        for key, entry in nested.entry_levels.tensors.items():
            state[key] = torch.where(entry <= level, state[key], torch.tensor(0.0))
        state |= {key: tensor.clone() for key, tensor in nested.own_tensors(level).items()}
        plain.load_state_dict(state)
        with torch.no_grad():
            expected = plain(batch)
            assert expected.shape == (2, classes)
            torch.testing.assert_close(nested(batch, level=level), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(nested.at_level(level)(batch), expected, rtol=0, atol=1e-5)
        assert [nested.elements(level, name) for name in nested.heads] == [
            plain.get_parameter(name).numel() for name in nested.heads
        ]
    assert not set(nested.heads) & set(nested.entry)


def test_every_level_trains_its_own_classifier(make_model: MakeModel) -> None:
    nested = nest(make_model("test_resnet")).train()
    nested(torch.randn(4, 3, 64, 64), level=1).square().sum().backward()
    trained = {name: nested.own_tensors(1)[name].grad for name in nested.heads}
    assert all(gradient is not None and bool(gradient.any()) for gradient in trained.values())
    assert all(nested.own_tensors(2)[name].grad is None for name in nested.heads)
    assert all(nested.shared_tensor(name).grad is None for name in nested.heads)


def test_coarse_rows_are_means() -> None:
    rows = torch.randn(10, 6, 1, 1)
    expected = torch.stack([rows[[i for i in range(10) if PARENTS[i] == k]].mean(0) for k in range(3)])
    torch.testing.assert_close(coarse_rows(rows, torch.tensor(PARENTS)), expected)


def test_network_without_a_classifier_with_a_row_per_class_is_refused(make_model: MakeModel) -> None:
    model = make_model("test_resnet")
    spec = describe_model(model)
    with pytest.raises(UnsupportedModelError, match=r"classifier of test_resnet .*data.hierarchy"):
        head_names(model, type(spec)(**{**vars(spec), "classifier": ()}))
    with pytest.raises(UnsupportedModelError, match="not a layer with one row per class"):
        head_names(model, type(spec)(**{**vars(spec), "classifier": ("conv1",)}))


def narrow(architecture: str) -> NestedModel:
    """Return a model whose levels predict 3, 7 and 7 classes; the lower two are narrower."""
    shared = narrow_model(architecture)
    nested = NestedModel(
        shared.network,
        shared.spec,
        shared.level_names,
        masked=(),
        level_sizes=shared.level_sizes,
        classes=[3, 7, 7],
    )
    with torch.no_grad():
        for level in (1, 2):
            for name in nested.heads:
                nested.own_tensors(level)[name].normal_()
    return nested.eval()


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_efficientnet"])
def test_narrower_level_applies_its_classifier_to_the_narrower_features(architecture: str) -> None:
    nested = narrow(architecture)
    batch = torch.randn(2, 3, SIDE, SIDE)
    weight, bias = (nested.own_tensors(1)[name] for name in sorted(nested.heads, reverse=True))
    with torch.no_grad():
        plain = nested.at_level(1)
        torch.testing.assert_close(plain(batch), nested(batch, level=1), rtol=0, atol=1e-5)
        assert plain(batch).shape == (2, 3)
        before = nested(batch, level=1)
        weight.mul_(2)
        bias.mul_(2)
        torch.testing.assert_close(nested(batch, level=1), 2 * before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["weights", "channels"])
def test_file_stores_the_classes_of_every_level(kind: str, tmp_path: Path, make_model: MakeModel) -> None:
    nested = narrow("test_resnet") if kind == "channels" else nest(make_model("test_resnet"))
    path = tmp_path / "a.nested.safetensors"
    maps = write_file(nested, path)
    batch = torch.randn(2, 3, 64, 64)
    loaded = nestify.load(path, check=False)
    assert loaded.classes == nested.classes
    with torch.no_grad():
        for level, classes in enumerate(nested.classes, start=1):
            expected = nested(batch, level=level)
            assert expected.shape == (2, classes)
            torch.testing.assert_close(loaded(batch, level=level), expected, rtol=0, atol=1e-6)
            alone = nestify.load(path, level=level, check=False)
            torch.testing.assert_close(alone(batch), expected, rtol=0, atol=1e-6)
        slice_file(path, 1, tmp_path / "slice")
        sliced = nestify.load(tmp_path / "slice", check=False)
        torch.testing.assert_close(sliced(batch), nested(batch, level=1), rtol=0, atol=1e-6)
    manifest = open_nested_file(tmp_path / "slice").manifest
    assert manifest.class_names(1) == maps.class_names
    assert manifest.hierarchy == [maps]


def test_classifier_of_another_shape_is_refused(tmp_path: Path, make_model: MakeModel) -> None:
    nested = nest(make_model("test_resnet"))
    path = tmp_path / "a.nested.safetensors"
    write_file(nested, path, coarse=4)  # the level's classifier has 3 rows
    for level in (1, None):
        with pytest.raises(BadFileError):
            nestify.load(path, level=level, check=False)


def write_file(nested: NestedModel, path: Path, coarse: int = 3) -> ClassMap:
    """Write a model whose core level predicts coarse classes, and return these."""
    n = nested.n_levels
    fine = nested.spec.num_classes
    parents = [k % coarse for k in range(fine)]
    maps = ClassMap(name="coarse", class_names=[f"c{k}" for k in range(coarse)], parents=parents)
    plain = description(n)
    levels = [
        level.model_copy(update={"classes": "coarse" if k == 1 else ""})
        for k, level in enumerate(plain.levels, start=1)
    ]
    model = plain.model.model_copy(
        update={
            "architecture": nested.spec.architecture,
            "kwargs": nested.spec.kwargs,
            "num_classes": fine,
            "class_names": None,
            "preprocessing": plain.model.preprocessing.model_copy(update={"input_size": (3, 64, 64)}),
        }
    )
    complete = plain.model_copy(update={"model": model, "levels": levels, "hierarchy": [maps]})
    write_nested_file(path, nested.nested_state(), complete)
    return maps
