"""k-NN votes against a loop in NumPy."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from nestify.evaluation.knn import predict_by_neighbours


@pytest.mark.parametrize("count", [15, 60])
def test_votes_are_those_of_a_loop(count: int) -> None:
    """20 neighbours, or all images if there are fewer; weights exp(similarity / 0.07)."""
    rng = np.random.default_rng(0)
    bank, queries = (rng.normal(size=(n, 4)) for n in (count, 30))
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    labels = rng.integers(0, 5, count)
    expected = []
    for query in queries:
        similarity = bank @ query
        votes = np.zeros(5)
        for index in np.argsort(-similarity)[:20]:
            votes[labels[index]] += np.exp(similarity[index] / 0.07)
        expected.append(votes.argmax())
    found = predict_by_neighbours(*map(torch.tensor, (queries, bank, labels)))
    assert found.tolist() == expected


def test_the_nearest_image_decides_against_many_far_ones() -> None:
    bank = functional.normalize(torch.tensor([[1.0, 0.0], *[[0.0, 1.0]] * 19]), dim=1)
    labels = torch.tensor([0, *[1] * 19])
    assert predict_by_neighbours(torch.tensor([[1.0, 0.0]]), bank, labels).tolist() == [0]
