"""Temperatures, consensus and cascades against NumPy, written out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nestify.errors import RecipeError
from nestify.evaluation.calibration import SHARPEST, SOFTEST, calibrate, fit_temperature, fit_weights
from nestify.evaluation.cascade import prepare_cascade
from nestify.evaluation.consensus import Predictions, Recorder, consensus

PARENTS = torch.tensor([0, 0, 1, 1, 1])
MACS = [(100, 10), (100, 40), (100, 100)]


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def answers_for(seed: int, images: int = 40, coarse: bool = True) -> Predictions:
    """Answers of three levels of 2 (coarse), 5 and 5 classes, the higher ones the better."""
    numbers = np.random.default_rng(seed)
    target = torch.from_numpy(numbers.integers(0, 5, images))
    own = {1: PARENTS[target] if coarse else target, 2: target, 3: target}
    logits = {}
    for level, labels in own.items():
        noise = numbers.normal(size=(images, 2 if coarse and level == 1 else 5))
        noise[np.arange(images), labels] += level
        logits[level] = torch.from_numpy(noise).float()
    return Predictions(logits, target, {1: PARENTS} if coarse else {}, 5)


def spread(predictions: Predictions, level: int) -> NDArray[np.float64]:
    """Probabilities over five classes."""
    own = softmax(predictions.logits[level].double().numpy())
    if level not in predictions.parents:
        return own
    return np.stack([own[:, 0] / 2, own[:, 0] / 2, own[:, 1] / 3, own[:, 1] / 3, own[:, 1] / 3], axis=1)


@given(st.integers(0, 2**16), st.booleans())
def test_mean_consensus_is_the_mean_of_probabilities(seed: int, coarse: bool) -> None:
    predictions = answers_for(seed, coarse=coarse)
    target = predictions.target.numpy()
    for level in (2, 3):
        mean = np.mean([spread(predictions, k) for k in range(1, level + 1)], axis=0)
        found = consensus(predictions, level, (), MACS)
        assert found.top1 == pytest.approx(100 * np.mean(mean.argmax(1) == target))
        assert found.loss == pytest.approx(-np.log(mean[np.arange(40), target]).mean(), rel=1e-5, abs=1e-6)
        assert (found.dense_macs, found.effective_macs) == ((200, 50), (300, 150))[level - 2]


@given(st.integers(0, 2**16), st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_learned_consensus_is_a_log_linear_pool_of_least_loss(seed: int, other: list[float]) -> None:
    predictions = answers_for(seed)
    rows = np.arange(40), predictions.target.numpy()

    def loss(weights: list[float]) -> float:
        pooled = softmax(sum(w * np.log(spread(predictions, k)) for k, w in enumerate(weights, start=1)))
        return float(-np.log(pooled[rows]).mean())

    weights = fit_weights(predictions, [1, 2, 3])
    assert consensus(predictions, 3, weights, MACS).loss == pytest.approx(loss(weights), rel=1e-5, abs=1e-6)
    pull = 1e-3 * sum((w - 1 / 3) ** 2 for w in weights)
    assert loss(weights) + pull <= loss(other) + 1e-3 * sum((w - 1 / 3) ** 2 for w in other) + 1e-6


def test_temperature_undoes_a_scale() -> None:
    numbers = np.random.default_rng(0)
    logits = numbers.normal(size=(4000, 6)) * 2
    labels = np.array([numbers.choice(6, p=row) for row in softmax(logits)])
    target = torch.from_numpy(labels)
    plain = fit_temperature(torch.from_numpy(logits), target)
    assert plain == pytest.approx(1, abs=0.06)  # the labels were drawn from these probabilities
    for scale in (0.5, 3.0):
        assert fit_temperature(torch.from_numpy(logits * scale), target) == pytest.approx(
            plain * scale, rel=1e-4
        )


@given(st.integers(0, 2**16))
def test_no_other_temperature_has_less_loss(seed: int) -> None:
    predictions = answers_for(seed)
    logits, target = predictions.logits[2].double(), predictions.target

    def loss(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / temperature, target))

    best = fit_temperature(predictions.logits[2], target)
    for other in np.geomspace(SHARPEST, SOFTEST, 50):
        assert loss(best) <= loss(float(other)) + 1e-9


def test_temperature_of_levels_that_know_all_or_nothing() -> None:
    target = torch.arange(4)
    assert fit_temperature(torch.eye(4), target) == pytest.approx(SHARPEST)
    assert fit_temperature(-torch.eye(4), target) == pytest.approx(SOFTEST)


def test_every_level_has_a_temperature_and_a_consensus_of_its_own() -> None:
    predictions = answers_for(1)
    found = calibrate(predictions)
    assert list(found.temperatures) == [
        fit_temperature(predictions.logits[1], PARENTS[predictions.target]),
        fit_temperature(predictions.logits[2], predictions.target),
        fit_temperature(predictions.logits[3], predictions.target),
    ]
    assert [len(weights) for weights in found.weights] == [1, 2, 3]


@given(st.integers(0, 2**16), st.floats(0, 1))
def test_cascade_stops_at_the_first_level_that_is_sure(seed: int, threshold: float) -> None:
    predictions = answers_for(seed)
    temperatures = [0.5, 1.0, 2.0]
    correct, dense, effective, stops = 0, 0, 0, [0, 0, 0]
    for image in range(40):
        for level in (1, 2, 3):
            dense += MACS[level - 1][0]
            effective += MACS[level - 1][1]
            own = softmax(predictions.logits[level][image].double().numpy() / temperatures[level - 1])
            if own.max() >= threshold or level == 3:
                label = int(predictions.target[image])
                correct += int(own.argmax() == (int(PARENTS[label]) if level == 1 else label))
                stops[level - 1] += 1
                break
    found = prepare_cascade(predictions, temperatures, MACS).at_threshold(threshold)
    assert found.top1 == pytest.approx(100 * correct / 40)
    assert found.shares == pytest.approx([count / 40 for count in stops])
    assert (found.dense_macs, found.effective_macs) == (
        pytest.approx(dense / 40),
        pytest.approx(effective / 40),
    )


@given(st.integers(0, 2**16), st.floats(10, 200))
def test_cascade_within_a_budget_uses_it_as_far_as_it_can(seed: int, macs: float) -> None:
    cascade = prepare_cascade(answers_for(seed), [1.0, 1.0, 1.0], MACS)
    found = cascade.within_budget(macs)
    assert found.effective_macs is not None
    assert found.effective_macs <= macs
    higher = [t for t in np.unique(cascade.confidence[:-1]) if t > found.threshold]
    for threshold in higher:
        cost = cascade.at_threshold(float(threshold)).effective_macs
        assert cost is not None
        assert cost > macs


def test_what_a_cascade_cannot_do() -> None:
    with pytest.raises(RecipeError, match="below the core level's own 10"):
        prepare_cascade(answers_for(0), [1.0] * 3, MACS).within_budget(9)
    unknown = prepare_cascade(answers_for(0), [1.0] * 3, [(None, None), (1, 1), (2, 2)])
    assert unknown.at_threshold(0.5).dense_macs is None
    with pytest.raises(RecipeError, match="does not know the MACs"):
        unknown.within_budget(9)


def test_recorder_keeps_every_level_and_the_targets_once() -> None:
    recorder = Recorder()
    batches = [(torch.randn(n, 3), torch.arange(n)) for n in (3, 2)]
    for level, scale in ((2, 2.0), (1, 1.0)):
        network = recorder.record_logits(level, lambda images, scale=scale: images * scale)
        for images, _ in recorder.record_targets(batches):
            network(images)
    predictions = recorder.predictions({}, 3)
    images = torch.cat([images for images, _ in batches])
    assert list(predictions.logits) == [1, 2]
    torch.testing.assert_close(predictions.logits[2], images * 2)
    assert predictions.target.tolist() == [0, 1, 2, 0, 1]
