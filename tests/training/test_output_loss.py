"""The loss of embeddings against NumPy."""

import numpy as np
import pytest
import torch

from nestify.training.output_loss import feature_distance


def test_is_one_minus_cosine_plus_relative_mse() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (rng.normal(size=(4, 6)).astype(np.float32) for _ in range(2))
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    expected = 1 - cosine.mean() + ((ours - theirs) ** 2).mean() / (theirs**2).mean()
    assert float(feature_distance(torch.tensor(ours), torch.tensor(theirs))) == pytest.approx(
        expected, rel=1e-5
    )


def test_does_not_depend_on_the_unit_of_the_teacher() -> None:
    ours, theirs = torch.randn(2, 5), torch.randn(2, 5)
    torch.testing.assert_close(feature_distance(100 * ours, 100 * theirs), feature_distance(ours, theirs))


def test_feature_maps_are_compared_per_image() -> None:
    ours, theirs = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(
        feature_distance(ours, theirs), feature_distance(ours.flatten(1), theirs.flatten(1))
    )


def test_is_zero_for_equal_outputs_and_teaches_only_the_student() -> None:
    target = torch.randn(3, 4, requires_grad=True)
    assert float(feature_distance(target.detach().half(), target.half())) == pytest.approx(0, abs=1e-6)
    output = (2 * target).detach().requires_grad_()
    feature_distance(output, target).backward()
    assert target.grad is None
    assert output.grad is not None
    assert bool((output.grad * target > 0).all())  # a longer embedding must become shorter
