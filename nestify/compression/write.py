"""Writing the result of a run, and checking the written file."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nestify.compression.base import BaseFile
from nestify.compression.compressed import Compressed
from nestify.compression.inputs import stored_dtype
from nestify.errors import BadFileError, OutputError
from nestify.file.loading import load
from nestify.file.manifest import HeldOut, Manifest
from nestify.file.writer import write_nested_file
from nestify.recipe.recipe import Recipe
from nestify.schedule.description import block_units, describe


def write_compressed(
    recipe: Recipe,
    done: Compressed,
    held_out: HeldOut | None = None,
    base: BaseFile | None = None,
    record: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write a nested file, and load it again before it takes the place of an older one.

    Args:
        recipe: the recipe, which names the output and the stored type.
        done: the result of the run.
        held_out: how the validation images were held out of the training images; None if they were not.
        base: the file that the run extends; None without one.
        record: what the file stores as its recipe; None stores all of `recipe`.

    Raises:
        OutputError: if the file cannot be written, or cannot be loaded again.
    """
    output = recipe.output_path
    state = done.nested.nested_state(block_units(done.nested, done.levels))
    description = describe(
        recipe,
        done.levels,
        done.nested,
        done.costs,
        labels=done.labels,
        source_sha256=done.pretrained.source_sha256,
        original=done.original,
        before=done.before,
        after=done.after,
        calibration=done.calibration,
        held_out=held_out,
    )
    if record is not None:
        description = description.model_copy(update={"recipe": dict(record)})
    if base is not None:
        description, state = base.merge(description, state)
    check = partial(_check_written, output, base)
    return write_nested_file(output, state, description, stored_dtype(recipe), check)


def _check_written(output: Path, base: BaseFile | None, written: Path) -> None:
    """Refuse a file that cannot be loaded again, or changes the levels of the file that it extends."""
    if base is not None:
        base.check_written(written)
    try:
        load(written)
    except BadFileError as error:
        raise OutputError(
            f"{output}: the written file cannot be loaded again, so it was not kept: {error}"
        ) from error
