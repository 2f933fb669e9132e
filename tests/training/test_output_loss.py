"""Losses of outputs against NumPy."""

import numpy as np
import pytest
import torch

from nestify.recipe.metric import MAP
from nestify.training.output_loss import feature_distance, output_loss


def test_is_one_minus_cosine_plus_relative_mse() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (rng.normal(size=(4, 6)).astype(np.float32) for _ in range(2))
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    relative = ((ours - theirs) ** 2).mean(1) / (theirs**2).mean(1)
    expected = 1 - cosine.mean() + relative.mean()
    assert float(feature_distance(torch.tensor(ours), torch.tensor(theirs))) == pytest.approx(
        expected, rel=1e-5
    )


def test_of_a_batch_is_the_mean_of_its_parts() -> None:
    """As gradients of several processes and accumulated batches are."""
    ours = torch.randn(6, 5)
    theirs = torch.randn(6, 5).sign() * torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0, 7.0])[:, None]
    parts = [feature_distance(ours[part], theirs[part]) for part in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(feature_distance(ours, theirs), (2 * parts[0] + 4 * parts[1]) / 6)


def test_the_part_of_an_empty_image_is_limited() -> None:
    theirs = torch.ones(4, 5)
    theirs[0] = 0
    loss = feature_distance(1.5 * torch.ones(4, 5), theirs)
    # cosine 0 and 1, 1, 1; errors 2.25 and 0.25, 0.25, 0.25; mean square 0.75
    assert float(loss) == pytest.approx(1 - 0.75 + (2.25 / 0.075 + 0.75) / 4)


def test_of_several_maps_it_is_the_mean() -> None:
    ours, theirs = ([torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)] for _ in range(2))
    each = [feature_distance(one, other) for one, other in zip(ours, theirs, strict=True)]
    torch.testing.assert_close(feature_distance(ours, theirs), (each[0] + each[1]) / 2)


def test_labels_diverge_one_by_one() -> None:
    """The mean over labels of KL(Bernoulli(p) || Bernoulli(q)) * T^2, by NumPy."""
    ours, theirs = torch.randn(4, 3), torch.randn(4, 3)
    compare = output_loss(MAP)
    target = compare.soften(theirs, 2.0)
    q, p = (1 / (1 + np.exp(-logits.double().numpy() / 2)) for logits in (ours, theirs))
    expected = 4 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    assert float(compare.loss(ours, target, 2.0)) == pytest.approx(expected, rel=1e-4)
    assert float(compare.loss(theirs, target, 2.0)) == pytest.approx(0, abs=1e-6)


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
