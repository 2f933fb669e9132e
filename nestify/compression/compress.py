"""`compress` and `plan`: from a recipe to a nested file, or to what it would cost."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import torch

from nestify.compression.inputs import stored_dtype
from nestify.compression.run import Compressed, Run
from nestify.errors import BadFileError, BudgetError, OutputError
from nestify.evaluation.gates import GateResult, check_gates
from nestify.file.loading import load
from nestify.file.manifest import Manifest
from nestify.file.summary import Report, open_report, read_report
from nestify.file.writer import write_nested_file
from nestify.files import checkpoint_path, metrics_path
from nestify.machine import pick_device
from nestify.recipe.recipe import Recipe, load_recipe
from nestify.schedule.costs import Plan
from nestify.schedule.description import block_units, describe
from nestify.training.distributed import World, join_process_group
from nestify.training.logs import MetricsLog, check_logs, open_logs
from nestify.training.observer import Observer, Observers


@dataclass(frozen=True)
class Result:
    """Result of `compress`.

    Attributes:
        path: path of the nested file.
        manifest: its manifest.
        gates: limits of the recipe's [gates], and whether the levels meet them; only on rank 0.
    """

    path: Path
    manifest: Manifest
    gates: Sequence[GateResult] = ()


def plan(
    recipe: Recipe | str, overrides: Mapping[str, object] | None = None, *, estimate: bool = False
) -> Plan:
    """Plan what `compress` would do; opens model and images, without training or writing.

    Args:
        recipe: a recipe, or what `load_recipe` takes.
        overrides: options that replace the recipe's, if `recipe` is not a `Recipe`.
        estimate: whether to run one small step to estimate time and memory.
    """
    return Run(_recipe(recipe, overrides), Observer()).plan(estimate=estimate)


def compress(
    recipe: Recipe | str,
    overrides: Mapping[str, object] | None = None,
    *,
    observer: Observer | None = None,
    resume: bool | None = None,
) -> Result:
    """Turn a pretrained model into a nested file, with `metrics.jsonl` next to it.

    Each of the processes that torchrun starts trains on a share of the images; rank 0 writes.

    During training a checkpoint, NAME.resume.safetensors, is also stored there. The same call resumes from it
    after an interruption, to the same bytes on a CPU. It is removed when the nested file is written.

    Args:
        recipe: a recipe, or what `load_recipe` takes: a path, a built-in recipe, a timm model.
        overrides: options that replace the recipe's, if `recipe` is not a `Recipe`.
        observer: notified of progress.
        resume: True resumes from a checkpoint, which must exist. False starts from scratch. None resumes if
            there is a checkpoint.

    Raises:
        RecipeError: also if the checkpoint belongs to a different run, or there is none to resume from.
        CheckpointError: also if the checkpoint is damaged.
        BudgetError: if a level missed its budget; the file is still written.
        NestifyError: for any other problem; an older file at the output is then unchanged.
    """
    recipe = _recipe(recipe, overrides)
    with join_process_group(pick_device(recipe.device)) as (world, device):
        return _compress(recipe, observer or Observer(), resume, world, device)


def _compress(
    recipe: Recipe, watcher: Observer, resume: bool | None, world: World, device: torch.device
) -> Result:
    """Run `compress` in one of several processes: all compute, rank 0 logs and writes."""
    if not world.is_main:
        watcher = Observer()
    output = recipe.output_path
    _check_outputs(recipe)
    check_logs(recipe.train.log)
    baseline = _baseline(recipe)
    run = Run(recipe, watcher, world, device)
    run.checkpoints.find(resume)
    with run.checkpoints.noting_resume_point():
        watcher.planned(plan := run.plan())
        log_offsets = run.checkpoints.log_offsets
        with ExitStack() as open_files:
            if world.is_main:
                metrics = open_files.enter_context(MetricsLog(metrics_path(output), log_offsets))
                logs = open_logs(recipe.train.log, output, log_offsets, plan.finetune_steps)
                run.observer = Observers([watcher, metrics, *open_files.enter_context(logs)])
            done = run.execute()
        watcher.stage(f"writing {output}")
        manifest = world.broadcast_object(_write(recipe, done) if world.is_main else None)
    assert manifest is not None
    if world.is_main:
        run.checkpoints.remove()
    if done.missed:
        raise BudgetError(f"{'; '.join(done.missed)}; {output} was written")
    judged = world.is_main and recipe.gates.given()
    return Result(
        output, manifest, check_gates(recipe.gates, read_report(output), baseline) if judged else ()
    )


def _baseline(recipe: Recipe) -> Report | None:
    """Read the baseline before the work: it must exist, and may be the file that will be replaced."""
    return None if recipe.gates.baseline is None else open_report(recipe.gates.baseline)


def _write(recipe: Recipe, done: Compressed) -> Manifest:
    output = recipe.output_path
    return write_nested_file(
        output,
        done.nested.nested_state(block_units(done.nested, done.levels)),
        describe(
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
        ),
        stored_dtype(recipe),
        check=partial(_check_loads, output),
    )


def _recipe(recipe: Recipe | str, overrides: Mapping[str, object] | None) -> Recipe:
    if isinstance(recipe, Recipe):
        assert not overrides, "a Recipe is complete; overrides go with a recipe's name"
        return recipe
    return load_recipe(recipe, overrides)


def _check_outputs(recipe: Recipe) -> None:
    """Check before the work that all results can be written."""
    outputs = {
        "output": recipe.output_path,
        "the checkpoint beside the output": checkpoint_path(recipe.output_path),
    }
    if recipe.finetune.save is not None:
        outputs["finetune.save"] = Path(recipe.finetune.save)
    inputs = [path for path in (recipe.model.checkpoint, recipe.train.teacher_checkpoint) if path is not None]
    for option, path in outputs.items():
        try:
            if path.is_dir():
                raise OutputError(f"{option} = {path} is a folder; give the path of a file in it")
            if path.exists() and not path.is_file():
                raise OutputError(f"{option} = {path} is not a regular file; choose another path")
            if path.exists() and any(os.path.exists(other) and path.samefile(other) for other in inputs):
                raise OutputError(f"{option} = {path} is the checkpoint of this run; choose another path")
            with TemporaryFile(dir=Path(os.path.realpath(path)).parent):
                pass
        except (OSError, ValueError) as error:  # ValueError: a NUL, or a character that no name can have
            raise OutputError(
                f"{option} = {path} cannot be written ({getattr(error, 'strerror', None) or error}); "
                "choose a folder that exists and can be written to"
            ) from error


def _check_loads(output: Path, written: Path) -> None:
    """Refuse a file that cannot be loaded again, so that it does not replace an older one."""
    try:
        load(written)
    except BadFileError as error:
        raise OutputError(
            f"{output}: the written file cannot be loaded again, so it was not kept: {error}"
        ) from error
