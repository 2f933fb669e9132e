"""Options of the loss that do not fit each other. Does not import torch."""

from typing import TYPE_CHECKING

from nestify.recipe.problems import Problem, format_toml

if TYPE_CHECKING:
    from nestify.recipe.recipe import Recipe


def loss_problems(recipe: "Recipe") -> list[Problem]:
    """Return problems of `train.loss` and `train.class_weights` with each other and with other options."""
    train, augment, data = recipe.train, recipe.augment, recipe.data
    problems = []
    if train.loss == "asl" and (augment.mixup or augment.cutmix):
        problems.append(
            Problem(
                "train.loss",
                'train.loss = "asl" needs one class per image; leave augment.mixup and augment.cutmix out',
            )
        )
    if train.class_weights is None:
        return problems
    key = f"train.class_weights = {format_toml(train.class_weights)}"
    if train.loss not in ("ce", "bce"):
        problems.append(
            Problem(
                "train.class_weights", f'{key} works with train.loss = "ce" and "bce"; choose one of them'
            )
        )
    if data.hierarchy is not None:
        problems.append(
            Problem(
                "train.class_weights",
                f"{key} has one weight per class of the data, and data.hierarchy gives levels other classes; "
                "leave one of them out",
            )
        )
    return problems
