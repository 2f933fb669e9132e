"""Accuracy against NumPy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from nestify.evaluation.accuracy import Accuracy, evaluate
from nestify.evaluation.measure import measure_levels
from nestify.model.nested_model import NestedModel
from nestify.model.spec import describe_model
from nestify.recipe.metric import TOP1


def test_figures_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(23, 8)).astype(np.float32)
    target = rng.integers(0, 8, 23)
    pieces = [(torch.tensor(logits[i : i + 10]), torch.tensor(target[i : i + 10])) for i in range(0, 23, 10)]
    (result,) = evaluate({4: lambda images: images}, pieces)
    order = np.argsort(-logits, axis=1)
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert result.level == 4
    assert result.images == 23
    assert result.top1 == pytest.approx(100 * (order[:, 0] == target).mean())
    assert result.top5 == pytest.approx(100 * (order[:, :5] == target[:, None]).any(1).mean())
    assert result.loss == pytest.approx(-log_softmax[np.arange(23), target].mean(), rel=1e-5)
    assert result.images_per_second > 0


def test_each_level_is_evaluated_as_itself_and_the_mode_comes_back(
    make_model: Callable[..., nn.Module],
) -> None:
    model = make_model("test_resnet", num_classes=4)
    nested = NestedModel(model, describe_model(model), ["a", "b"])
    with torch.no_grad():
        nested.own_tensors(1)["bn1.weight"].zero_()
    images = torch.randn(6, 3, 32, 32)
    nested.train()
    target = nested.at_level(2)(images).argmax(-1)
    low, full = measure_levels(nested, [(images, target)], [1, 2], TOP1)
    assert isinstance(low, Accuracy)
    assert isinstance(full, Accuracy)
    assert nested.training
    assert full.top1 == 100
    assert low.top1 == pytest.approx(
        100 * float((nested.at_level(1)(images).argmax(-1) == target).float().mean())
    )
