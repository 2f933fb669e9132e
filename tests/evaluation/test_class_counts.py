"""Correct predictions by class against NumPy, and the progress of passes."""

import numpy as np
import torch

from nestify.evaluation.accuracy import evaluate
from nestify.evaluation.class_counts import ClassCounter, Passes


def test_counts_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 6)).astype(np.float32)
    target = rng.integers(0, 5, 40)  # no image of class 5
    pieces = [(torch.tensor(logits[i : i + 16]), torch.tensor(target[i : i + 16])) for i in range(0, 40, 16)]
    counter = ClassCounter(6, None)
    (result,) = evaluate({1: counter.watch_network(lambda images: images)}, counter.watch_batches(pieces))
    right = logits.argmax(1) == target
    counts = counter.counts()
    assert list(counts.images) == [int((target == k).sum()) for k in range(6)]
    assert list(counts.correct) == [int(right[target == k].sum()) for k in range(6)]
    assert counts.images[5] == 0
    assert sum(counts.images) == result.images


def test_coarser_classes() -> None:
    parents = torch.tensor([0, 0, 1, 1])
    counter = ClassCounter(2, parents)
    network = counter.watch_network(lambda images: torch.eye(2)[[0, 1, 1]])
    batches = [(torch.zeros(3, 1), torch.tensor([1, 2, 0]))]
    (result,) = evaluate({1: network}, counter.watch_batches(batches), parents={1: parents})
    assert (counter.counts().images, counter.counts().correct) == ((2, 1), (1, 1))
    assert round(result.top1, 4) == 66.6667


def test_progress_of_several_passes() -> None:
    seen: list[tuple[int, int]] = []
    passes = Passes(10, lambda done, total: seen.append((done, total)))
    batches = [(torch.zeros(3, 1), torch.zeros(3)), (torch.zeros(2, 1), torch.zeros(2))]
    for _ in range(2):
        assert [len(target) for _, target in passes.watch_batches(batches)] == [3, 2]
    assert seen == [(3, 10), (5, 10), (8, 10), (10, 10)]
