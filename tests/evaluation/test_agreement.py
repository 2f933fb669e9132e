"""Agreement and cosine similarity against NumPy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from nestify.errors import DivergedError
from nestify.evaluation.agreement import Agreement, Replay, Similarity, evaluate_agreement
from nestify.evaluation.measure import check_finite, measure_levels
from nestify.model.nested_model import NestedModel
from nestify.model.spec import describe_model
from nestify.recipe.metric import AGREEMENT


def test_figures_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(23, 5)).astype(np.float32)
    level, original = (rng.normal(size=(5, 4)).astype(np.float32) for _ in range(2))
    pieces = [(torch.tensor(images[i : i + 10]), None) for i in range(0, 23, 10)]
    [result] = evaluate_agreement(
        {4: lambda batch: batch @ torch.tensor(level)}, lambda batch: batch @ torch.tensor(original), pieces
    )
    ours, theirs = images @ level, images @ original
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert isinstance(result, Agreement)
    assert (result.level, result.images) == (4, 23)
    assert result.agreement == pytest.approx(100 * (ours.argmax(1) == theirs.argmax(1)).mean())
    assert result.cosine == pytest.approx(cosine.mean(), rel=1e-5)
    assert 0 < result.agreement < 100
    assert result.score == result.agreement
    assert result.images_per_second > 0


def test_a_level_agrees_with_itself_and_the_mode_comes_back(make_model: Callable[..., nn.Module]) -> None:
    model = make_model("test_resnet", num_classes=4)
    nested = NestedModel(model, describe_model(model), ["a", "b"])
    nested.train()
    batches = [(torch.randn(3, 3, 32, 32), None) for _ in range(2)]
    [result] = measure_levels(nested, batches, [2], AGREEMENT, reference=nested.at_level(2))
    assert isinstance(result, Agreement)
    assert result.agreement == 100
    assert result.cosine == pytest.approx(1)
    assert result.cosine <= 1
    assert nested.training


def test_sums_are_those_of_all_processes() -> None:
    pieces = [(torch.eye(2), None)]
    [result] = evaluate_agreement(
        {1: lambda batch: batch},
        lambda batch: batch,
        pieces,
        total=lambda sums: sums + torch.tensor([2.0, 0, 0]),
    )
    assert isinstance(result, Agreement)
    assert (result.images, result.agreement) == (4, 50)


def test_similarity_of_feature_maps_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = ([rng.normal(size=(7, *shape)) for shape in ((3, 4, 4), (5, 2, 2))] for _ in range(2))
    flat = [(one.reshape(7, -1), other.reshape(7, -1)) for one, other in zip(ours, theirs, strict=True)]
    cosines = [
        (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
        for one, other in flat
    ]
    expected = np.mean(cosines)
    [result] = evaluate_agreement(
        {1: lambda _: list(map(torch.tensor, ours))},
        lambda _: list(map(torch.tensor, theirs)),
        [(torch.zeros(7, 1), None)],
        of_classes=False,
    )
    assert isinstance(result, Similarity)
    assert result.cosine == pytest.approx(expected)
    assert result.score == pytest.approx(100 * expected)
    assert result.images == 7


def test_a_reference_is_computed_once() -> None:
    calls = []

    def network(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return images + 1

    replay = Replay(network)
    batches = [(torch.full((n, 2), float(n)), torch.zeros(n)) for n in (3, 1)]
    for _ in range(2):
        for images, _ in replay.watch_batches(batches):
            torch.testing.assert_close(replay(images), images + 1)
    assert calls == [3, 1]


def test_similarity_that_is_not_finite() -> None:
    with pytest.raises(DivergedError, match=r"cosine similarity of level 2 .*train\.lr"):
        check_finite([Agreement(2, 10.0, float("nan"), 5, 1.0)], "train.lr")
