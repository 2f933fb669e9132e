"""What a run is going to do, before it does it: levels with their costs, steps, and rough needs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from nestify.file.manifest import LayerEntry
from nestify.model.nested_model import NestedModel
from nestify.model.spec import ModelSpec
from nestify.recipe.levels import Level
from nestify.report.costs import MacCount, count_macs, effective_macs, layer_entries


@dataclass(frozen=True)
class LevelCost:
    """What one level of a nested model costs; see `nested_file.manifest.Metrics` for the numbers.

    Attributes:
        parameters: of the plain model. `nonzero_parameters`: those that are not masked out.
        sparsity: share of its maskable weights that are zeros.
        layers: one row per maskable weight.
        uncounted: operators that the MACs leave out, with how often they run.
    """

    parameters: int
    nonzero_parameters: int
    dense_macs: int
    effective_macs: int
    sparsity: float
    layers: Sequence[LayerEntry]
    uncounted: Mapping[str, int]


@dataclass(frozen=True)
class PlannedLevel:
    """One level as it will be.

    Attributes:
        level: what was asked for. `cost`: what its pattern can reach on this model.
        prefix_bytes: bytes of the nested file that the level needs, header included.
        classes: how many it tells. `class_set`: their name in the hierarchy; empty for the model's own.
    """

    level: Level
    cost: LevelCost
    prefix_bytes: int
    classes: int
    class_set: str


@dataclass(frozen=True)
class Plan:
    """A run in numbers.

    Attributes:
        spec: the model. `maskable`: number of weights that the schedule masks.
        channel_groups, blocks: groups of coupled channels where levels are narrower, and blocks that can be
            skipped where they are shallower; 0 elsewhere.
        without_rule: operators for which there is no rule, so that every level has their channels whole.
        warnings: sentences about levels that would be empty.
        dense_layers: maskable weights that the pattern cannot take, so that they stay whole.
        train_images, val_images: number of images, at most where some cannot be read.
        finetune_steps, steps: training steps before nesting, and of the nested training.
        uncounted: operators that the MAC counts leave out.
        seconds: rough time of the steps on this machine, image loading aside; None if not estimated.
        memory_bytes: rough peak of a training step beyond the libraries; None if not estimated.
    """

    spec: ModelSpec
    levels: Sequence[PlannedLevel]
    maskable: int
    dense_layers: Sequence[str]
    train_images: int
    val_images: int
    finetune_steps: int
    steps: int
    uncounted: Mapping[str, int]
    channel_groups: int = 0
    blocks: int = 0
    without_rule: Sequence[str] = ()
    warnings: Sequence[str] = ()
    seconds: float | None = None
    memory_bytes: int | None = None


def level_costs(nested: NestedModel, count: MacCount) -> list[LevelCost]:
    """The costs of all levels, core first; see `level_cost`."""
    return [level_cost(nested, k, count) for k in range(1, nested.n_levels + 1)]


def level_cost(nested: NestedModel, level: int, count: MacCount) -> LevelCost:
    """The cost of a level as it is now.

    Args:
        count: MACs of the full network; those of a level that is smaller, or tells other classes, are
            counted.
    """
    if nested.is_smaller(level) or nested.classes[level - 1] != nested.spec.num_classes:
        return _own_cost(nested, level)
    parameters = sum(parameter.numel() for parameter in nested.network.parameters())
    return _cost(nested, level, count, parameters, nested.spec.maskable)


def _own_cost(nested: NestedModel, level: int) -> LevelCost:
    plain = nested.at_level(level)
    own = dict(plain.named_parameters())
    parameters = sum(parameter.numel() for parameter in own.values())
    return _cost(nested, level, count_macs(plain, nested.spec.input_size), parameters, own)


def _cost(
    nested: NestedModel, level: int, count: MacCount, parameters: int, own: Collection[str]
) -> LevelCost:
    """The cost of a level of so many parameters.

    Args:
        count: the level's own MACs. `own`: names of the weights that it has.
    """
    entry = nested.entry_levels
    has = {name: nested.elements(level, name) if name in own else 0 for name in nested.spec.maskable}
    kept = {name: entry.kept(level, name) if name in entry.tensors and n else n for name, n in has.items()}
    densities = {name: kept[name] / n for name, n in has.items() if n}
    rows = {
        name: (kept[name], n, nested.shared_tensor(name).numel())
        for name, n in has.items()
        if name in entry.tensors or (nested.structure is not None and name not in nested.heads)
    }
    return LevelCost(
        parameters=parameters,
        nonzero_parameters=parameters - sum(has[name] - kept[name] for name in has),
        dense_macs=count.total,
        effective_macs=effective_macs(count, densities),
        sparsity=nested.sparsity(level),
        layers=layer_entries(count, rows),
        uncounted=count.uncounted,
    )
