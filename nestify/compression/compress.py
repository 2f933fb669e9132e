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
from nestify.errors import BadFileError, BudgetError, OutputError, RecipeError
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
from nestify.shown import Shown
from nestify.training.display import usual_observer
from nestify.training.distributed import World, join_process_group
from nestify.training.logs import MetricsLog, check_logs, open_logs
from nestify.training.observer import Observer, Observers


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """Result of `compress`.

    Attributes:
        path: path of the nested file.
        manifest: its manifest.
        gates: limits of the recipe's [gates], and whether the levels meet them; only on rank 0.
        report: report of the nested file; None on other ranks than 0.
    """

    path: Path
    manifest: Manifest
    gates: Sequence[GateResult] = ()
    report: Report | None = None


def plan(
    recipe: Recipe | str | os.PathLike[str],
    overrides: Mapping[str, object] | None = None,
    *,
    estimate: bool = False,
    observer: Observer | None = None,
) -> Plan:
    """Plan what `compress` would do; opens model and images, without training or writing.

    Args:
        recipe: a recipe, or what `load_recipe` takes.
        overrides: options that replace the recipe's, if `recipe` is not a `Recipe`.
        estimate: whether to run one small step to estimate time and memory.
        observer: notified of progress and warnings. None shows warnings: at a terminal and in a notebook on
            standard error, elsewhere through Python's `warnings`.
    """
    recipe = _recipe(recipe, overrides)
    return Run(recipe, observer or usual_observer(quiet=True)).plan(estimate=estimate)


def compress(
    recipe: Recipe | str | os.PathLike[str],
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
        observer: notified of progress and warnings, on rank 0. None shows them: at a terminal and in a
            notebook as the command line does; elsewhere there is no progress, and warnings go through
            Python's `warnings`. `Observer()` ignores everything.
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
        if observer is not None or not world.is_main:
            return _compress(recipe, observer or Observer(), resume, world, device)
        with usual_observer() as display:
            result = _compress(recipe, display, resume, world, device)
        display.repeat_warnings()
        return result


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
    if not world.is_main:
        return Result(output, manifest)
    report = read_report(output)
    gates = check_gates(recipe.gates, report, baseline) if recipe.gates.given() else ()
    return Result(output, manifest, gates, report)


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


def _recipe(recipe: Recipe | str | os.PathLike[str], overrides: Mapping[str, object] | None) -> Recipe:
    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError(
                f"overrides of {', '.join(overrides)} were given with a complete Recipe; give them to "
                "load_recipe, or give the recipe's name or path here"
            )
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
        except OSError as error:
            raise OutputError(
                f"{option} = {path} cannot be written ({error.strerror or error}); "
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
