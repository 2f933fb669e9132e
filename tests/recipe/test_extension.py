"""The recipe of a run that adds levels: what follows from the file, and what may be given."""

from dataclasses import replace

import pytest

from nestify.errors import RecipeError
from nestify.recipe.extension import Extended, extension_recipe
from nestify.recipe.levels import Level
from nestify.recipe.metric import AGREEMENT, COSINE, MAP, TOP1, Metric

FILE = Extended(
    name="core.safetensors",
    recipe={"model": {"name": "resnet18"}, "data": {"path": "."}, "level": [{"sparsity": 0.9}, {}]},
    kind="weight",
    levels=[Level("core", 0.9)],
    architecture="resnet18",
    kwargs={},
    input_size=(3, 64, 64),
)


@pytest.mark.parametrize(
    ("kwargs", "kept"),
    [
        ({"num_classes": 10, "img_size": 64, "depth": 3}, {"depth": 3}),
        ({"num_classes": 0}, {"num_classes": 0}),
        ({"features_only": True, "out_indices": [1, 2]}, {"features_only": True, "out_indices": [1, 2]}),
    ],
)
def test_a_backbone_stays_one(kwargs: dict[str, object], kept: dict[str, object]) -> None:
    """The checkpoint says how many classes there are, but not that its classifier is left out."""
    assert extension_recipe(replace(FILE, kwargs=kwargs), "0", {}).model.kwargs == kept


@pytest.mark.parametrize("key", ["model.kwargs", "model.kwargs.num_classes", "schedule.keep_outputs"])
def test_what_the_levels_depend_on_is_refused(key: str) -> None:
    with pytest.raises(RecipeError, match=rf"{key}.*core\.safetensors.*leave it out"):
        extension_recipe(FILE, "0", {key: 0})


@pytest.mark.parametrize(
    ("metric", "key", "value"),
    [
        (TOP1, "data.labels", "labels.csv"),
        (TOP1, "data.unlabelled", True),
        (MAP, "data.unlabelled", True),
        (AGREEMENT, "data.labels", "labels.csv"),
        (AGREEMENT, "data.unlabelled", False),
        (COSINE, "data.unlabelled", False),
    ],
)
def test_new_levels_are_judged_as_those_of_the_file(metric: Metric, key: str, value: object) -> None:
    with pytest.raises(RecipeError) as caught:
        extension_recipe(replace(FILE, metric=metric), "0", {key: value})
    [problem] = caught.value.problems
    assert problem.startswith(key)
    assert metric.title in problem


def test_levels_that_were_not_judged_may_be_extended_by_any_images() -> None:
    assert extension_recipe(FILE, "0", {"data.unlabelled": True}).data.unlabelled
    assert extension_recipe(FILE, "0", {"data.labels": "labels.csv"}).data.labels == "labels.csv"
    given = extension_recipe(replace(FILE, metric=MAP), "0", {"data.labels": "labels.csv"})
    assert given.data.labels == "labels.csv"


def test_images_of_a_file_from_a_loop_of_its_own_are_asked_for() -> None:
    recipe = {"model": {"name": "resnet18"}, "data": {"path": "own training loop"}}
    with pytest.raises(RecipeError, match=r"data\.path is not given.*core\.safetensors.*loop of its own"):
        extension_recipe(replace(FILE, recipe=recipe), "0", {"model.checkpoint": "resnet18.safetensors"})
