"""A recipe's options by dotted key, and which of them a run's result does not depend on. No torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from nestify.recipe import Recipe

FREE = {
    "output",
    "data.workers",
    "data.hierarchy",  # as of a checkpoint
    "data.on_bad_image",  # a run that refused such images has met none
    "train.checkpoint_minutes",
    "train.log",
    "model.checkpoint",  # what it holds is looked at instead
    "train.teacher_checkpoint",
}
"""Options that what comes out does not depend on."""


def is_free(key: str) -> bool:
    """Whether an option may be another one when a run goes on; gates only judge what came out."""
    return key in FREE or key.startswith("gates.")


def flat_options(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Every option by its dotted key, as a JSON value: `train.lr`, `level[1].sparsity`."""
    return flat_table(recipe.to_dict())


def flat_table(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The same of a recipe as plain JSON values, such as a nested file holds."""
    if isinstance(value, Mapping) and (value or not key):
        for name, item in value.items():
            yield from flat_table(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value, start=1):
            yield from flat_table(item, f"{key}[{number}]")
    else:
        yield key, value
