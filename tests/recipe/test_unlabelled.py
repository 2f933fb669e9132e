"""Options that need labels are refused with `data.unlabelled`, each with its key."""

import pytest

from nestify.errors import RecipeError
from nestify.recipe.recipe import Recipe, load_recipe


def load(**options: object) -> Recipe:
    return load_recipe("resnet18", {"data.path": "photos", "data.unlabelled": True, **options})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.new_head", True),
        ("finetune.epochs", 3),
        ("finetune.save", "dense.safetensors"),
        ("train.teacher", "none"),
        ("augment.mixup", 0.2),
        ("augment.cutmix", 1.0),
        ("augment.smoothing", 0.1),
        ("data.hierarchy", "classes.csv"),
        ("data.calibrate", 0.1),
        ("level[1].distill", 0.5),
        ("gates.min_top1", 70.0),
        ("gates.max_drop", 2.0),
    ],
)
def test_options_that_need_labels_are_refused(key: str, value: object) -> None:
    with pytest.raises(RecipeError) as caught:
        load(**{key: value})
    [problem] = caught.value.problems
    assert problem.startswith(key)
    assert "data.unlabelled = true" in problem
    load_recipe("resnet18", {"data.path": "photos"})


@pytest.mark.parametrize("teacher", ["original", "self", "both", "resnet50"])
def test_teachers_that_need_no_labels(teacher: str) -> None:
    assert load(**{"train.teacher": teacher}).train.teacher == teacher


def test_several_problems_are_told_together() -> None:
    with pytest.raises(RecipeError) as caught:
        load(**{"augment.mixup": 0.2, "gates.min_top1": 70.0, "train.teacher": "none"})
    assert len(caught.value.problems) == 3


def test_agreement_is_limited_only_without_labels() -> None:
    assert load(**{"gates.min_agreement": 90.0}).gates.min_agreement == 90
    with pytest.raises(RecipeError, match=r"gates\.min_agreement .*data\.unlabelled"):
        load_recipe("resnet18", {"data.path": "photos", "gates.min_agreement": 90.0})


def test_a_recipe_with_labels_has_no_new_keys() -> None:
    options = load_recipe("resnet18", {"data.path": "photos"}).to_dict()
    assert "unlabelled" not in options["data"]
    assert "min_agreement" not in options["gates"]
