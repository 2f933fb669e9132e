"""Writing the result of a run, and checking the written file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nestify.compression.base import BaseFile
from nestify.compression.compressed import Compressed
from nestify.compression.inputs import round_to_stored, stored_dtype
from nestify.data.hierarchy import ClassLevels
from nestify.errors import BadFileError, BudgetError, OutputError, RecipeError
from nestify.file.loading import load
from nestify.file.manifest import HeldOut, Manifest
from nestify.file.writer import write_nested_file
from nestify.model.entry_levels import EntryLevels
from nestify.model.nested_model import NestedModel
from nestify.model.pretrained import PretrainedModel
from nestify.recipe.levels import Level
from nestify.recipe.recipe import Recipe
from nestify.schedule.budgets import Solver
from nestify.schedule.costs import count_macs, level_costs
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


def write_model(
    nested: NestedModel,
    recipe: Recipe,
    levels: Sequence[Level],
    solver: Solver,
    class_names: Sequence[str],
    record: Mapping[str, Any],
) -> None:
    """Write a nested model that is still being trained; the model is not changed.

    Args:
        nested: the model, on any device.
        recipe: names the output and the stored type.
        levels: its levels, core first, with their budgets solved.
        solver: the solver of the budgets.
        class_names: names of the classes; empty if they have none.
        record: what the file stores as its recipe.

    Raises:
        RecipeError: if the names are not one for each class.
        DivergedError: if a level returns values that are not finite.
        BudgetError: if a level missed its budget; the file is still written.
        OutputError: if the file cannot be written, or cannot be loaded again.
    """
    _check_names(class_names, nested.spec.num_classes)
    copied = _copy_on_cpu(nested)
    count = count_macs(copied.network, copied.spec.input_size)
    missed = replace(solver, count=count).check(copied, levels)
    done = Compressed(
        nested=copied,
        levels=levels,
        pretrained=PretrainedModel(copied.network, copied.spec, source_sha256=None, new_head=False),
        costs=level_costs(copied, count),
        missed=missed,
        labels=ClassLevels(class_names=tuple(class_names) or None),
        original=None,
        before=(),
        after=(),
        calibration=None,
    )
    round_to_stored(copied, recipe)
    write_compressed(recipe, done, record=record)
    if missed:
        raise BudgetError(f"{'; '.join(missed)}; {recipe.output_path} was written")


def _check_names(names: Sequence[str], count: int) -> None:
    """Refuse names that do not identify the classes of a model.

    Raises:
        RecipeError: if they are no texts, or not as many as the classes, or one occurs twice.
    """
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise RecipeError(f"class_names = {names!r} is not a list of texts; give one for each class")
    if names and len(names) != count:
        raise RecipeError(f"{len(names)} class names were given for a model of {count} classes")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise RecipeError(f"class_names has {twice[0]!r} twice; give each class a name of its own")


def _copy_on_cpu(nested: NestedModel) -> NestedModel:
    """Return a copy of a nested model in eval mode on the CPU, without gradients and without a loop."""
    network = deepcopy(nested.network)
    for parameter in network.parameters():
        parameter.grad = None
    copied = NestedModel(
        network.cpu(),
        nested.spec,
        nested.level_names,
        entry=EntryLevels(nested.n_levels, {name: entry.cpu() for name, entry in nested.entry.items()}),
        bn=nested.bn,
        level_sizes=nested.level_sizes,
    )
    state = nested.state_dict()
    state.pop("_extra_state", None)
    copied.load_state_dict(state)
    return copied.to(memory_format=torch.contiguous_format).eval()
