"""The training task of a recipe: the same for `compress` and for loops of the user's own."""

from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from nestify.model.nested_model import NestedModel
from nestify.recipe.level_options import level_weights
from nestify.recipe.metric import TOP1, Metric
from nestify.recipe.recipe import Recipe
from nestify.training.output_loss import output_loss
from nestify.training.task import Criterion, NestedTask, Teacher, TeacherKind

Task = TypeVar("Task", bound=NestedTask)

MOST_PER_STEP = 4
"""Levels that a step trains, unless `train.sandwich` says otherwise."""


def make_task(
    kind: type[Task],
    nested: NestedModel,
    recipe: Recipe,
    criterion: Criterion | Sequence[Criterion],
    teacher: TeacherKind,
    frozen: nn.Module | None,
    device: torch.device,
    *,
    trained: Collection[int] | None = None,
    metric: Metric = TOP1,
    **options: Any,
) -> Task:
    """Return a task that trains levels as a recipe says.

    Args:
        kind: the class of the task.
        nested: the model to train.
        recipe: says how much levels and teacher count.
        criterion: the task loss; see `NestedTask`.
        teacher: who teaches.
        frozen: the frozen teacher network; None without one.
        device: the device that trains.
        trained: numbers of the levels that are trained; None: all.
        metric: what the levels are judged by, which says how they are compared with the teacher.
        options: further arguments of the task.
    """
    train, levels = recipe.train, recipe.level
    numbers = range(1, len(levels) + 1) if trained is None else trained
    mean, std = (tuple(nested.spec.preprocessing[key]) for key in ("mean", "std"))
    soft_targets = Teacher(
        teacher,
        frozen,
        mean=mean,
        std=std,
        temperature=train.temperature,
        compare=output_loss(metric),
    )
    return kind(
        nested,
        criterion,
        weights=[
            weight if level in numbers else 0.0 for level, weight in enumerate(level_weights(levels), start=1)
        ],
        distill=[train.distill if level.distill is None else level.distill for level in levels],
        teacher=soft_targets.to(device),
        sandwich=train.sandwich or (None if len(numbers) <= MOST_PER_STEP else MOST_PER_STEP),
        device=device,
        seed=recipe.seed,
        metric=metric,
        **options,
    )
