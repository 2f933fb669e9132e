"""Losses against closed forms and scikit-learn's definition of balanced weights."""

from typing import Any

import numpy as np
import pytest
import torch

import nestify
from nestify.errors import RecipeError
from nestify.recipe.augment_options import AugmentOptions
from nestify.recipe.options import TrainOptions
from nestify.training.losses import balanced_weights, label_loss, multi_label_loss


def loss(options: dict[str, Any], counts: list[int] | None = None, **augment: float) -> Any:
    return label_loss(TrainOptions(**options), AugmentOptions(**augment), counts)


def test_balanced_weights() -> None:
    """n_images / (n_classes * count), so that each class has the same total weight."""
    counts = [90, 9, 1]
    np.testing.assert_allclose(balanced_weights(counts).numpy(), [100 / (3 * n) for n in counts], rtol=1e-6)
    assert balanced_weights([4, 0, 4]).tolist() == [1, 1, 1]


def test_weighted_cross_entropy() -> None:
    """The weighted mean of -log p of the class, by NumPy."""
    torch.manual_seed(0)
    logits, target = torch.randn(8, 3).double(), torch.tensor([0, 0, 0, 0, 1, 1, 2, 0])
    found = loss({"class_weights": "balanced"}, [60, 30, 10]).double()(logits, target)
    log_p = logits.log_softmax(-1).numpy()[range(8), target]
    weights = np.array([100 / 180, 100 / 90, 100 / 30])[target]
    assert float(found) == pytest.approx(-(weights * log_p).sum() / weights.sum(), rel=1e-5)


def test_binary_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(8, 3), torch.randint(0, 3, (8,))
    p, hot = torch.sigmoid(logits).numpy(), np.eye(3)[target]
    expected = -(hot * np.log(p) + (1 - hot) * np.log(1 - p)).mean()
    assert float(loss({"loss": "bce"})(logits, target)) == pytest.approx(expected, rel=1e-4)


def test_loss_of_several_labels() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(8, 3), torch.randint(0, 2, (8, 3)).float()
    p, marked = torch.sigmoid(logits).numpy(), target.numpy()
    terms = -(marked * np.log(p) + (1 - marked) * np.log(1 - p))
    plain = multi_label_loss(TrainOptions(loss="bce"), AugmentOptions())
    assert float(plain(logits, target)) == pytest.approx(terms.mean(), rel=1e-4)
    balanced = multi_label_loss(TrainOptions(loss="bce"), AugmentOptions(), [20, 50, 0], 100)
    weights = np.where(marked > 0, [4.0, 1.0, 1.0], 1.0)  # images without over images with the label
    assert float(balanced(logits, target)) == pytest.approx((weights * terms).mean(), rel=1e-4)
    asymmetric = multi_label_loss(TrainOptions(loss="asl"), AugmentOptions())
    assert type(asymmetric).__name__ == "AsymmetricLossMultiLabel"


def test_the_usual_loss_is_cross_entropy() -> None:
    logits, target = torch.randn(8, 3), torch.randint(0, 3, (8,))
    assert float(loss({})(logits, target)) == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, target))
    )


def test_mixed_targets() -> None:
    """A target of one class with weight 1 has the loss of that class, whether the images are mixed or not."""
    logits, target = torch.randn(8, 3), torch.randint(0, 3, (8,))
    hot = torch.nn.functional.one_hot(target, 3).float()
    mixed = loss({"class_weights": "balanced"}, [1, 1, 1], mixup=0.2)(logits, hot)
    assert float(mixed) == pytest.approx(float(loss({})(logits, target)))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"train.loss": "asl", "augment.mixup": 0.2}, "train.loss.*mixup"),
        ({"train.loss": "poly", "train.class_weights": "balanced"}, "class_weights.*bce"),
        ({"train.class_weights": "balanced", "data.hierarchy": "a.csv"}, "class_weights.*hierarchy"),
        ({"train.class_weights": "balanced", "data.unlabelled": True}, "class_weights.*labels"),
        ({"train.loss": "bce", "data.unlabelled": True}, "train.loss.*labels"),
        ({"train.loss": "focal"}, "train.loss"),
    ],
)
def test_options_that_do_not_fit(overrides: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        nestify.load_recipe("digits", overrides)


def test_old_recipes_stay_as_they_are() -> None:
    """The keys are stored only if they are set, so that older files keep their bytes."""
    assert {"loss", "class_weights"}.isdisjoint(nestify.load_recipe("digits").to_dict()["train"])
