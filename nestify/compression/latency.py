"""Budgets of latency: the times that they are predicted from, and the measurement at the end of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time

from torch import nn

from nestify.engine.layer_times import THREADS, LayerTimes
from nestify.evaluation.bench import Bench, bench
from nestify.model.spec import ModelSpec
from nestify.recipe.amounts import LATENCY_TOLERANCE, Budget
from nestify.recipe.levels import Level
from nestify.recipe.recipe import Recipe
from nestify.training.distributed import World
from nestify.training.observer import Observer


@dataclass
class LayerTimer:
    """Measures a model's layers on rank 0's machine, once in a run.

    Attributes:
        spec: description of the model.
        recipe: the recipe with the levels.
        world: the processes of the run, which all get the same times.
        times: the times; None before they are measured.
    """

    spec: ModelSpec
    recipe: Recipe
    world: World
    times: LayerTimes | None = None

    def measure(self, observer: Observer, networks: Sequence[nn.Module]) -> LayerTimes:
        """Return the times of the layers.

        Args:
            observer: notified of the stage.
            networks: the model at several widths, the narrowest first and the full one last; not changed.

        Raises:
            NestifyError: if the model does not run on the sparse engine.
        """
        if self.times is None:
            from nestify.engine.profile import layer_times  # needs onnx, which not every installation has

            observer.stage("measuring the layers on the sparse engine")
            recipe = self.recipe
            masked = recipe.schedule.kind == "weight" or any(level.sparsity for level in recipe.levels)
            self.times = self.world.on_main(lambda: layer_times(networks, self.spec, packed=masked))
        return self.times


def _latency_budgets(levels: Sequence[Level]) -> dict[int, Budget]:
    return {
        k: level.budget
        for k, level in enumerate(levels, start=1)
        if level.budget is not None and level.budget.quantity == "latency"
    }


def missed_latencies(path: Path, levels: Sequence[Level], observer: Observer) -> list[str]:
    """Measure the levels of a file on the engine, and return a message for each that misses its latency.

    The measurement is saved next to the file, where `nestify report` finds it. A level that misses its
    latency in it is measured again in processor time, which decides. Nothing is measured if no level has a
    budget of latency.

    Args:
        path: the nested file.
        levels: its levels, core first.
        observer: notified of the stage.
    """
    budgets = _latency_budgets(levels)
    if not budgets:
        return []
    observer.stage("measuring the levels on the sparse engine")
    measure = partial(bench, path, batch_sizes=(1,), threads=(THREADS,), engine=True)
    missed = _slow_levels(measure(save=True), budgets)
    if missed:  # wall time counts what other programs take, so it is confirmed without that
        missed = _slow_levels(measure(clock=process_time), {k: budgets[k] for k in missed})
    return [
        f"level[{k}].budget = {budgets[k]} was missed: the level takes {share:.3g} of the full level's time"
        for k, share in missed.items()
    ]


def _slow_levels(measured: Bench, budgets: Mapping[int, Budget]) -> dict[int, float]:
    """Return the share of the full level's time that each level takes which misses its budget."""
    [measurement] = measured.measurements
    shares = {latency.level: latency.over_full for latency in measurement.levels}
    return {
        k: shares[k] for k, budget in budgets.items() if shares[k] > budget.amount * (1 + LATENCY_TOLERANCE)
    }
