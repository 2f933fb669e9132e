"""Entry levels from a ranking over all layers, against sorting all scores."""

import numpy as np
import pytest
import torch

from nestify.schedule.ranking import enter_best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("limited", [False, True])
def test_levels_get_the_best_weights_that_they_can_use(seed: int, limited: bool) -> None:
    numbers = np.random.default_rng(seed)
    sizes = [5, 1, 70, 24]
    decimals = seed % 3  # 0 and 1 give equal scores
    layers = [np.round(numbers.exponential(size=n), decimals).astype(np.float32) for n in sizes]
    lowest = [numbers.integers(1, 4 if limited else 2, n) for n in sizes]
    scores, usable = np.concatenate(layers), np.concatenate(lowest)
    targets = [int(share * (usable <= k).sum()) for k, share in enumerate((0.1, 0.5, 1.0), start=1)]
    expected = np.full(len(scores), 4)
    for level, target in enumerate(targets, start=1):
        candidates = [i for i in range(len(scores)) if expected[i] == 4 and usable[i] <= level]
        candidates.sort(key=lambda i: (-scores[i], i))
        expected[candidates[: target - int((expected < 4).sum())]] = level
    available = [torch.from_numpy(each).to(torch.uint8) if limited else None for each in lowest]
    found = enter_best(targets, [torch.from_numpy(layer) for layer in layers], available)
    assert torch.cat(found).tolist() == expected.tolist()


def test_scores_that_differ_in_their_last_bits() -> None:
    scores = torch.tensor([1.0, 2.0]).nextafter(torch.tensor(3.0)).tolist()
    layers = [torch.tensor([1.0, scores[0]]), torch.tensor([scores[1], 2.0])]
    assert [entry.tolist() for entry in enter_best([1, 2, 3], layers, [None, None])] == [[4, 3], [1, 2]]
