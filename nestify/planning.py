"""What a run is going to do, before it does it: levels with their costs, steps, and rough needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2

from nestify.levels import Level
from nestify.model_spec import ModelSpec
from nestify.nested_file.manifest import LayerEntry
from nestify.nested_model import NestedModel
from nestify.report.costs import MacCount, count_macs, effective_macs, layer_entries


@dataclass(frozen=True)
class PlannedLevel:
    """One level as it will be.

    Attributes:
        level: what was asked for. `sparsity`: what its pattern can reach on this model.
        parameters: of the plain model. `nonzero_parameters`: those that are not masked out.
        dense_macs, effective_macs: per image; see `nested_file.manifest.Metrics`.
        data_bytes: about how many data bytes of the nested file the level needs, header aside.
    """

    level: Level
    sparsity: float
    parameters: int
    nonzero_parameters: int
    dense_macs: int
    effective_macs: int
    data_bytes: int


@dataclass(frozen=True)
class Plan:
    """A run in numbers.

    Attributes:
        spec: the model. `maskable`: number of weights that the schedule masks.
        channel_groups: groups of coupled channels; 0 where the schedule is another. `without_rule`:
            operators for which there is no rule, so that every level has their tensors whole.
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
    without_rule: Sequence[str] = ()
    seconds: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class LevelCost:
    """What one level of a nested model costs; see `nested_file.manifest.Metrics` for the numbers.

    Attributes:
        sparsity: share of the maskable weights that it has as zeros; 0 for a narrower level, which has none.
        layers: one row per maskable weight.
    """

    parameters: int
    nonzero_parameters: int
    dense_macs: int
    effective_macs: int
    sparsity: float
    layers: Sequence[LayerEntry]


def level_cost(nested: NestedModel, level: int, count: MacCount) -> LevelCost:
    """The cost of a level as it is now.

    Args:
        count: MACs of the full network; a narrower level's own are counted.
    """
    if nested.is_narrow(level):
        return _narrow_cost(nested, level)
    entry = nested.entry_levels
    parameters = sum(parameter.numel() for parameter in nested.network.parameters())
    kept = {name: (entry.kept(level, name), entry[name].numel()) for name in entry}
    if nested.structure is not None:
        kept = {name: 2 * (nested.shared_tensor(name).numel(),) for name in nested.spec.maskable}
    densities = {name: used / weights for name, (used, weights) in kept.items() if weights}
    return LevelCost(
        parameters=parameters,
        nonzero_parameters=parameters - sum(weights - used for used, weights in kept.values()),
        dense_macs=count.total,
        effective_macs=effective_macs(count, densities),
        sparsity=entry.sparsity(level),
        layers=layer_entries(count, kept),
    )


def _narrow_cost(nested: NestedModel, level: int) -> LevelCost:
    plain = nested.at_level(level)
    own = dict(plain.named_parameters())
    count = count_macs(plain, nested.spec.input_size)
    parameters = sum(parameter.numel() for parameter in own.values())
    return LevelCost(
        parameters=parameters,
        nonzero_parameters=parameters,
        dense_macs=count.total,
        effective_macs=count.total,
        sparsity=0.0,
        layers=[
            LayerEntry(
                name=name,
                weights=nested.shared_tensor(name).numel(),
                kept=own[name].numel() if name in own else 0,
                dense_macs=count.by_weight.get(name, 0),
                effective_macs=count.by_weight.get(name, 0),
            )
            for name in nested.spec.maskable
        ],
    )


def plan_levels(
    nested: NestedModel, levels: Sequence[Level], count: MacCount, value_bytes: int = 4
) -> list[PlannedLevel]:
    """Work out the costs of every level; shared values take `value_bytes` each."""
    planned = []
    data_bytes = 0.0
    for k, level in enumerate(levels, start=1):
        cost = level_cost(nested, k, count)
        data_bytes += _chunk_bytes(nested, k, value_bytes)
        planned.append(
            PlannedLevel(
                level=level,
                sparsity=cost.sparsity,
                parameters=cost.parameters,
                nonzero_parameters=cost.nonzero_parameters,
                dense_macs=cost.dense_macs,
                effective_macs=cost.effective_macs,
                data_bytes=round(data_bytes),
            )
        )
    return planned


def _chunk_bytes(nested: NestedModel, level: int, value_bytes: int) -> float:
    """Values, the entropy of which positions enter, and private tensors."""
    private = nested.private_tensors(level)
    total = float(sum(tensor.numel() * tensor.element_size() for tensor in private.values()))
    entry = nested.entry_levels
    for name, tensor in nested.shared_tensors().items():
        if name in private:
            continue
        if name in entry.tensors:
            below = entry.kept(level - 1, name)
            entering = entry.kept(level, name) - below
            total += _entropy_bits(entering, tensor.numel() - below) / 8
        else:
            entering = nested.elements(level, name) - (nested.elements(level - 1, name) if level > 1 else 0)
        total += entering * value_bytes
    return total


def _entropy_bits(chosen: int, of: int) -> float:
    """Shannon entropy of choosing, in bits: of * H(chosen / of)."""
    if not 0 < chosen < of:
        return 0.0
    p = chosen / of
    return -of * (p * log2(p) + (1 - p) * log2(1 - p))
