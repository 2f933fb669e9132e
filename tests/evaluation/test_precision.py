"""Mean average precision against NumPy and worked examples."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nestify.errors import DataError
from nestify.evaluation.measure import measure
from nestify.evaluation.precision import Precision, average_precision, evaluate_precision
from nestify.recipe.metric import MAP


def by_definition(scores: NDArray[np.float64], target: NDArray[np.bool_]) -> float:
    """Average precision as scikit-learn documents it: sum of (R_n - R_(n-1)) P_n over distinct thresholds."""
    found, before = 0.0, 0.0
    for threshold in np.unique(scores)[::-1]:
        chosen = scores >= threshold
        recall = (target & chosen).sum() / target.sum()
        found += (recall - before) * (target & chosen).sum() / chosen.sum()
        before = recall
    return found


def test_figures_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    logits = np.round(rng.normal(size=(40, 6)), 1)  # with ties
    target = rng.random((40, 6)) < 0.3
    target[:, 5] = False
    pieces = [
        (torch.tensor(logits[i : i + 15]).float(), torch.tensor(target[i : i + 15]).float())
        for i in range(0, 40, 15)
    ]
    [result] = measure({3: lambda images: images}, pieces, MAP)
    assert isinstance(result, Precision)
    expected = [by_definition(logits[:, k], target[:, k]) for k in range(5)]  # no image has the last label
    assert result.map == pytest.approx(100 * np.mean(expected))
    assert (result.level, result.images) == (3, 40)
    loss = np.log1p(np.exp(-np.abs(logits))) + np.maximum(logits, 0) - logits * target
    assert result.loss == pytest.approx(loss.mean(), rel=1e-5)
    assert result.score == result.map


def test_a_worked_example() -> None:
    # The example of scikit-learn's documentation of average_precision_score, and its result there.
    scores, target = torch.tensor([[0.1], [0.4], [0.35], [0.8]]), torch.tensor([[0], [0], [1], [1]])
    assert float(average_precision(scores, target)) == pytest.approx(0.8333, abs=1e-4)


def test_images_of_all_processes_are_ranked_together() -> None:
    here = [(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [0.0]]))]
    gathered = iter([torch.tensor([[0.0]]), torch.tensor([[2.0]])])  # targets, then logits, of another one
    [result] = evaluate_precision(
        {1: lambda images: images}, here, gather=lambda rows: [rows, [next(gathered)]]
    )
    assert result.images == 3
    assert result.map == 50  # the other process has an image with a higher score, and without the label


def test_images_without_any_label() -> None:
    with pytest.raises(DataError, match="none of the images"):
        measure({1: lambda images: images}, [(torch.zeros(2, 3), torch.zeros(2, 3))], MAP)
