"""`extend`: add higher levels to a nested file, whose own levels stay as they are."""

import os
from collections.abc import Mapping
from pathlib import Path

from nestify.compression.base import BaseFile
from nestify.compression.compress import Result, run_compress
from nestify.compression.preflight import check_recipe
from nestify.errors import RecipeError
from nestify.file.manifest import Manifest
from nestify.file.reader import NestedFile, open_nested_file
from nestify.files import sibling
from nestify.recipe.extension import Extended, extension_recipe
from nestify.recipe.levels import Level, parse_pattern
from nestify.recipe.metric import METRICS, Metric
from nestify.recipe.recipe import Recipe
from nestify.training.observer import Observer


def extend(
    file: str | os.PathLike[str],
    levels: object,
    overrides: Mapping[str, object] | None = None,
    *,
    observer: Observer | None = None,
    resume: bool | None = None,
) -> Result:
    """Add higher levels to a nested file that does not end at a full level, and write the larger file.

    The levels of the file stay as they are, bit for bit, so a device that has them needs only the bytes of
    the new ones: `upgrade_slice`. The new levels learn around them, from the weights of the original model.
    Interrupted runs resume as those of `compress` do.

    Args:
        file: a nested file, or its address; all of its levels are read.
        levels: the levels to add, in the quantity of the file's schedule: `"0"`, `"0.5,0"`, `[0.5, 0]`.
        overrides: options that replace those of the recipe that made the file: `model.checkpoint` (the
            original model), `data.path`, `train.epochs`, `output`.
        observer: as in `compress`.
        resume: as in `compress`.

    Raises:
        RecipeError: if the file has a full level already, the new levels do not continue its own, or an
            option is wrong.
        BadFileError: if the file is damaged.
        CheckpointError: if the checkpoint does not fit the file's architecture.
        NestifyError: for any other problem; an older file at the output is then unchanged.
    """
    opened = open_nested_file(file)
    recipe = plan_extension(opened, levels, overrides or {})
    return run_compress(recipe, observer, resume, BaseFile(opened))


def plan_extension(file: NestedFile, levels: object, overrides: Mapping[str, object]) -> Recipe:
    """Return the checked recipe of a run that adds levels to a file.

    Args:
        file: the open file.
        levels: as in `extend`.
        overrides: as in `extend`.

    Raises:
        NestifyError: as in `extend`.
    """
    manifest = file.manifest
    if manifest.hierarchy:
        raise RecipeError(
            f"{file.name}: its levels predict different classes (data.hierarchy), which cannot be extended; "
            "compress all levels in one run"
        )
    later = [level.extension.recipe for level in manifest.levels if level.extension is not None]
    recipe = extension_recipe(
        Extended(
            name=file.name,
            recipe=later[-1] if later else manifest.recipe,
            kind=manifest.schedule,
            levels=[
                Level(level.name, level.sparsity, parse_pattern(level.pattern), level.width, level.depth)
                for level in manifest.levels
            ],
            architecture=manifest.model.architecture,
            kwargs=manifest.model.kwargs,
            input_size=manifest.model.preprocessing.input_size,
            metric=_metric_of_levels(manifest),
        ),
        levels,
        overrides,
    )
    if recipe.output is None:
        output = sibling(Path(file.name), ".extended.nested.safetensors").name
        recipe = recipe.model_copy(update={"output": output})
    check_recipe(recipe)
    return recipe


def _metric_of_levels(manifest: Manifest) -> Metric | None:
    """Return what the levels of a file are judged by; None if they were not evaluated."""
    measured = (level.metrics for level in manifest.levels)
    return next((m for each in measured for m in METRICS if getattr(each, m.key) is not None), None)
