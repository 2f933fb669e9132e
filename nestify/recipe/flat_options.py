"""The options of a recipe as one flat list of dotted keys, to compare recipes."""

from collections.abc import Iterator, Mapping
from typing import Any

from nestify.recipe.paths import INPUT_FILES
from nestify.recipe.recipe import Recipe

FREE = {
    "output",
    "data.workers",
    "data.on_bad_image",  # a run that refuses such images has met none
    "train.checkpoint_minutes",
    "train.timeout_minutes",
    "train.log",
    *INPUT_FILES,  # weights, classes and labels in them are compared instead
}
"""Options that the result does not depend on."""


def is_free(key: str) -> bool:
    """Return whether an option may change when a run resumes; gates only judge the result."""
    return key in FREE or key.startswith("gates.")


def flat_options(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Yield every option by its dotted key, as a JSON value: `train.lr`, `level[1].sparsity`."""
    return flat_table(recipe.to_dict())


def flat_table(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the options of a recipe that is given as plain JSON values, as a nested file stores it."""
    if isinstance(value, Mapping) and (value or not key):
        for name, item in value.items():
            yield from flat_table(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value, start=1):
            yield from flat_table(item, f"{key}[{number}]")
    else:
        yield key, value
