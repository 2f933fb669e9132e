"""`compress` and `plan`: from a recipe to a nested file, or to what it would cost."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from nestify.accelerator import pick_device
from nestify.compression.base import BaseFile
from nestify.compression.latency import missed_latencies
from nestify.compression.preflight import check_recipe
from nestify.compression.run import Run
from nestify.compression.write import write_compressed
from nestify.errors import BudgetError, RecipeError
from nestify.evaluation.gates import GateResult, check_gates
from nestify.file.history import read_history
from nestify.file.manifest import Manifest
from nestify.file.summary import Report, open_report, read_report
from nestify.files import lock_output, metrics_path, sibling
from nestify.recipe.flat_options import flat_options
from nestify.recipe.recipe import Recipe, load_recipe
from nestify.report.html.page import html_page
from nestify.schedule.costs import Plan
from nestify.shown import Shown
from nestify.training.display import usual_observer
from nestify.training.distributed import World
from nestify.training.logs import MetricsLog, open_logs
from nestify.training.observer import Observer, Observers
from nestify.training.precision import chosen_kernels
from nestify.training.process_group import join_process_group
from nestify.training.trackers import TRACKERS


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
    check_recipe(recipe)
    run = Run(recipe, observer or usual_observer(quiet=True))
    with chosen_kernels(run.recipe.train, run.device):
        return run.plan(estimate=estimate)


def compress(
    recipe: Recipe | str | os.PathLike[str],
    overrides: Mapping[str, object] | None = None,
    *,
    observer: Observer | None = None,
    resume: bool | None = None,
) -> Result:
    """Turn a pretrained model into a nested file, with `metrics.jsonl` next to it.

    Each of the processes that torchrun, srun or mpirun starts trains on a share of the images; rank 0 writes.

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
    check_recipe(recipe)
    return run_compress(recipe, observer, resume)


def run_compress(
    recipe: Recipe, observer: Observer | None, resume: bool | None, base: BaseFile | None = None
) -> Result:
    """Do the work of `compress` and of `extend`.

    Args:
        recipe: a recipe that was checked.
        observer: as in `compress`.
        resume: as in `compress`.
        base: the file that the run extends; None without one.
    """
    train = recipe.train
    joined = join_process_group(
        pick_device(recipe.device), train.timeout_minutes, getattr(torch, train.exchange), train.overlap
    )
    with joined as (world, device):
        if observer is not None or not world.is_main:
            return _compress(recipe, observer or Observer(), resume, world, device, base)
        with usual_observer() as display:
            result = _compress(recipe, display, resume, world, device, base)
        display.repeat_warnings()
        return result


def _compress(
    recipe: Recipe,
    watcher: Observer,
    resume: bool | None,
    world: World,
    device: torch.device,
    base: BaseFile | None,
) -> Result:
    """Run in one of several processes: all compute, rank 0 logs and writes."""
    if not world.is_main:
        watcher = Observer()
    output = recipe.output_path
    baseline = _baseline(recipe)
    with _locked(output, watcher, world):
        manifest, missed = _run_and_write(recipe, watcher, resume, world, device, base)
    if missed:
        raise BudgetError(f"{'; '.join(missed)}; {output} was written")
    if not world.is_main:
        return Result(output, manifest)
    report = read_report(output)
    gates = check_gates(recipe.gates, report, baseline) if recipe.gates.given() else ()
    return Result(output, manifest, gates, report)


def _run_and_write(
    recipe: Recipe,
    watcher: Observer,
    resume: bool | None,
    world: World,
    device: torch.device,
    base: BaseFile | None,
) -> tuple[Manifest, Sequence[str]]:
    """Do the work of `compress`; return the manifest, and a sentence per missed budget."""
    output = recipe.output_path
    opened: list[Run] = []
    world.everywhere(lambda: opened.append(Run(recipe, watcher, world, device, base)))
    [run] = opened
    run.checkpoints.find(resume)
    with run.checkpoints.noting_resume_point(), chosen_kernels(run.recipe.train, device):
        watcher.planned(plan := run.plan())
        log_offsets = run.checkpoints.log_offsets
        with ExitStack() as open_files:
            if world.is_main:
                metrics = open_files.enter_context(
                    MetricsLog(metrics_path(output), log_offsets, watcher.warned)
                )
                logs = open_logs(
                    recipe.train.log,
                    output,
                    log_offsets,
                    plan.finetune_steps,
                    watcher.warned,
                    options=dict(flat_options(run.recipe)),
                    tracker_runs=run.checkpoints.tracker_runs,
                )
                run.observer = Observers([watcher, metrics, *open_files.enter_context(logs)])
            done = run.execute()
            watcher.stage(f"writing {output}")
            manifest = world.on_main(
                lambda: write_compressed(run.recipe, done, run.inputs.held_out_record, base)
            )
            if world.is_main and set(recipe.train.log) & set(TRACKERS):
                _hand_over(output, run.observer)
    if world.is_main:
        run.checkpoints.remove()
    slow = missed_latencies(output, done.levels, watcher) if world.is_main else []
    return manifest, [*done.missed, *world.broadcast_object(slow)]


def _hand_over(output: Path, observer: Observer) -> None:
    """Hand the nested file and its report, as a page, to the trackers of a run."""
    with TemporaryDirectory() as folder:
        page = Path(folder) / sibling(output, ".html").name
        report = read_report(output)
        page.write_text(html_page(report, history=read_history(report)), encoding="ascii")
        observer.written([output, page])


@contextmanager
def _locked(output: Path, watcher: Observer, world: World) -> Iterator[None]:
    """Lock the output for the processes of one run; rank 0 holds the lock.

    Raises:
        RecipeError: in all processes, if another run writes this output.
    """
    with ExitStack() as lock:
        world.on_main(lambda: lock.enter_context(lock_output(output, watcher.warned)))
        yield


def _baseline(recipe: Recipe) -> Report | None:
    """Read the baseline before the work: it must exist, and may be the file that will be replaced."""
    return None if recipe.gates.baseline is None else open_report(recipe.gates.baseline)


def _recipe(recipe: Recipe | str | os.PathLike[str], overrides: Mapping[str, object] | None) -> Recipe:
    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError(
                f"overrides of {', '.join(overrides)} were given with a complete Recipe; give them to "
                "load_recipe, or give the recipe's name or path here"
            )
        return recipe
    return load_recipe(recipe, overrides)
