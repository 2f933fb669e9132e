"""Options that need one class per image are refused with `data.labels`, each with its key."""

import pytest

from nestify.errors import RecipeError
from nestify.recipe.recipe import Recipe, load_recipe


def load(**options: object) -> Recipe:
    return load_recipe("resnet18", {"data.path": "photos", "data.labels": "labels.csv", **options})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.loss", "ce"),
        ("augment.mixup", 0.2),
        ("augment.cutmix", 1.0),
        ("data.hierarchy", "classes.csv"),
        ("data.calibrate", 0.1),
        ("gates.min_top1", 70.0),
        ("gates.min_agreement", 70.0),
    ],
)
def test_options_that_need_one_class_are_refused(key: str, value: object) -> None:
    with pytest.raises(RecipeError) as caught:
        load(**{key: value})
    [problem] = caught.value.problems
    assert problem.startswith(key)


@pytest.mark.parametrize("loss", ["bce", "asl", "poly"])
def test_losses_of_several_labels(loss: str) -> None:
    assert load(**{"train.loss": loss, "augment.smoothing": 0.1, "gates.min_map": 50.0}).train.loss == loss
    assert load(**{"train.loss": loss}).to_dict()["data"]["labels"] == "labels.csv"


def test_weights_need_a_loss_that_has_them() -> None:
    assert load(**{"train.class_weights": "balanced", "train.loss": "asl"})
    with pytest.raises(RecipeError, match="class_weights"):
        load(**{"train.class_weights": "balanced", "train.loss": "poly"})


def test_labels_and_no_labels_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match=r"data\.labels"):
        load(**{"data.unlabelled": True})


def test_precision_is_limited_only_with_several_labels() -> None:
    with pytest.raises(RecipeError, match=r"gates\.min_map .*data\.labels"):
        load_recipe("resnet18", {"data.path": "photos", "gates.min_map": 90.0})
    options = load_recipe("resnet18", {"data.path": "photos"}).to_dict()
    assert "labels" not in options["data"]
    assert not {"min_map", "min_cosine"} & set(options["gates"])
