"""Options of the loss that do not fit each other. Does not import torch."""

from typing import TYPE_CHECKING

from nestify.recipe.problems import Problem, format_toml

if TYPE_CHECKING:
    from nestify.recipe.recipe import Recipe


def loss_problems(recipe: "Recipe") -> list[Problem]:
    """Return problems of `train.loss`, `train.class_weights` and `data.labels` with other options."""
    train, augment, data = recipe.train, recipe.augment, recipe.data
    if data.labels is not None and not data.unlabelled:
        return [
            Problem(key, f"{text} (data.labels)")
            for key, applies, text in _needing_one_class(recipe)
            if applies
        ]
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


def _needing_one_class(recipe: "Recipe") -> list[tuple[str, object, str]]:
    """Return key, whether it is given, and problem of each option that needs one class per image."""
    train, augment, data = recipe.train, recipe.augment, recipe.data
    rules: list[tuple[str, object, str]] = [
        (
            "train.loss",
            train.loss == "ce" and "loss" in train.model_fields_set,
            'train.loss = "ce" is for one class per image; give bce, asl or poly, or leave it out',
        ),
        (
            "train.class_weights",
            train.class_weights is not None and train.loss == "poly",
            f'train.class_weights = {format_toml(train.class_weights)} works with train.loss = "bce" and '
            '"asl"; choose one of them',
        ),
        (
            "data.hierarchy",
            data.hierarchy is not None,
            f"data.hierarchy = {format_toml(data.hierarchy)} has one coarser class per class, and images "
            "have several labels; leave one of them out",
        ),
        (
            "data.calibrate",
            data.calibrate is not None,
            f"data.calibrate = {data.calibrate}: temperatures and consensus weights are fitted to one class "
            "per image; leave it out",
        ),
    ]
    for key in ("mixup", "cutmix"):
        value = getattr(augment, key)
        text = f"augment.{key} = {value:g} mixes images of one class each; leave it out"
        rules.append((f"augment.{key}", value, text))
    return rules
