"""Budgets of latency: the times that they are predicted from, and the measurement at the end of a run."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from nestify.engine.layer_times import THREADS, LayerTimes
from nestify.evaluation.bench import bench
from nestify.model.spec import ModelSpec
from nestify.recipe.amounts import LATENCY_TOLERANCE, Budget
from nestify.recipe.levels import Level
from nestify.recipe.recipe import Recipe
from nestify.training.distributed import World
from nestify.training.observer import Observer


def times_of_layers(
    network: nn.Module, spec: ModelSpec, recipe: Recipe, observer: Observer, world: World
) -> LayerTimes | None:
    """Return the times of a network's layers on rank 0's machine; None if no level has a budget of latency.

    Args:
        network: a timm model, not changed.
        spec: its description.
        recipe: the recipe with the levels.
        observer: notified of the stage.
        world: the processes of the run, which all get the same times.

    Raises:
        NestifyError: if the model does not run on the sparse engine.
    """
    if not _latency_budgets(recipe.levels):
        return None
    from nestify.engine.profile import layer_times  # needs onnx, which not every installation has

    observer.stage("measuring the layers on the sparse engine")
    return world.on_main(lambda: layer_times(network, spec))


def _latency_budgets(levels: Sequence[Level]) -> dict[int, Budget]:
    return {
        k: level.budget
        for k, level in enumerate(levels, start=1)
        if level.budget is not None and level.budget.quantity == "latency"
    }


def missed_latencies(path: Path, levels: Sequence[Level], observer: Observer) -> list[str]:
    """Measure the levels of a file on the engine, and return a message for each that misses its latency.

    The measurement is saved next to the file, where `nestify report` finds it. Nothing is measured if no
    level has a budget of latency.

    Args:
        path: the nested file.
        levels: its levels, core first.
        observer: notified of the stage.
    """
    budgets = _latency_budgets(levels)
    if not budgets:
        return []
    observer.stage("measuring the levels on the sparse engine")
    [measurement] = bench(path, batch_sizes=(1,), threads=(THREADS,), engine=True, save=True).measurements
    shares = {latency.level: latency.over_full for latency in measurement.levels}
    return [
        f"level[{k}].budget = {budget} was missed: the level takes {shares[k]:.3g} of the full level's time"
        for k, budget in budgets.items()
        if shares[k] > budget.amount * (1 + LATENCY_TOLERANCE)
    ]
