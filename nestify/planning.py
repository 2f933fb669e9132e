"""What a run is going to do, before it does it: levels with their costs, steps, and rough needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2

from torch import Tensor, nn

from nestify.levels import Level
from nestify.model_spec import ModelSpec
from nestify.nesting import EntryLevels
from nestify.report.costs import MacCount, effective_macs


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
    seconds: float | None = None
    memory_bytes: int | None = None


def plan_levels(
    network: nn.Module,
    levels: Sequence[Level],
    entry: EntryLevels,
    private: Sequence[Mapping[str, Tensor]],
    count: MacCount,
    value_bytes: int = 4,
) -> list[PlannedLevel]:
    """Work the costs of every level out of its entry levels; shared values take `value_bytes` each."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    planned = []
    data_bytes = 0.0
    for k, level in enumerate(levels, start=1):
        kept = entry.kept(k)
        data_bytes += _chunk_bytes(entry, k, private[k - 1], value_bytes)
        if k == 1:
            data_bytes += value_bytes * (parameters - entry.total - _elements(private[k - 1]))
        planned.append(
            PlannedLevel(
                level=level,
                sparsity=entry.sparsity(k),
                parameters=parameters,
                nonzero_parameters=parameters - entry.total + kept,
                dense_macs=count.total,
                effective_macs=effective_macs(count, densities(entry, k)),
                data_bytes=round(data_bytes),
            )
        )
    return planned


def densities(entry: EntryLevels, level: int) -> dict[str, float]:
    """Share of each maskable weight that a level uses, by name."""
    return {name: entry.kept(level, name) / entry[name].numel() for name in entry if entry[name].numel()}


def _chunk_bytes(entry: EntryLevels, level: int, private: Mapping[str, Tensor], value_bytes: int) -> float:
    """Values, the entropy of which positions enter, and private tensors."""
    total = float(sum(tensor.numel() * tensor.element_size() for tensor in private.values()))
    for name in entry:
        below = entry.kept(level - 1, name)
        entering = entry.kept(level, name) - below
        total += entering * value_bytes + _entropy_bits(entering, entry[name].numel() - below) / 8
    return total


def _entropy_bits(chosen: int, of: int) -> float:
    """Shannon entropy of choosing, in bits: of * H(chosen / of)."""
    if not 0 < chosen < of:
        return 0.0
    p = chosen / of
    return -of * (p * log2(p) + (1 - p) * log2(1 - p))


def _elements(private: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for name, tensor in private.items() if name.endswith((".weight", ".bias")))
