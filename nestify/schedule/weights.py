"""The weights that each level uses: entry levels are chosen by a score.

Every score ranks units (single weights, or blocks of weights), and each level keeps the best units of the
same ranking, so levels nest whatever the score is. The N:M pattern ranks within each group of M instead.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from nestify.accelerator import as_float64
from nestify.model.entry_levels import EntryLevels
from nestify.recipe.level_options import Score
from nestify.recipe.levels import Level, Pattern
from nestify.schedule.ranking import enter_best
from nestify.schedule.units import Units

GLOBAL_SCORES = ("fisher", "lamp", "magnitude", "per_mac")
"""The scores that rank all layers together."""

Weights = Mapping[str, Tensor]


@torch.no_grad()
def select_entry_levels(
    weights: Weights,
    levels: Sequence[Level],
    score: Score = "lamp",
    available: Weights | None = None,
    macs: Mapping[str, int] | None = None,
) -> EntryLevels:
    """Choose the entry level of each weight.

    Args:
        weights: name -> maskable weight of shape (out, in, *kernel), or of any other shape with two or more
            dimensions; all on one device.
        levels: core first, sparsities not increasing.
        score: `fisher`, `lamp`, `magnitude` and `per_mac` rank all layers together; `uniform` and `erk` give
            each layer a budget and rank by magnitude within the layer. `fisher` expects weights whose squares
            are their saliencies, and ranks by the geometric mean of the saliency and its LAMP score. Of all
            choices with as many effective MACs or fewer, `per_mac` makes that with the largest sum of LAMP
            scores.
        available: name -> uint8 in the weight's shape, the lowest level that can use each weight, the same
            for all weights of a block. None: level 1 can use all weights.
        macs: name -> dense multiply-accumulates per image of each weight tensor, for `per_mac`.

    Returns:
        Entry levels, none below `available`. With the unstructured pattern, level k keeps exactly
        round((1 - sparsity_k) * total) of the `total` weights that it can use; with blocks, the nearest
        number that complete blocks can reach.
    """
    pattern = next((level.pattern for level in levels if level.sparsity > 0), Pattern())
    if pattern.kind == "n:m":
        entry = _select_n_of_m(weights, levels, pattern.m, available)
        if available is not None:
            entry = {name: torch.maximum(tensor, available[name]) for name, tensor in entry.items()}
        return EntryLevels(len(levels), entry)
    units = {
        name: Units(weight, pattern, None if available is None else available[name])
        for name, weight in weights.items()
    }
    if score in GLOBAL_SCORES:
        assert score != "per_mac" or macs is not None
        entries = _enter_by_global_rank(units, levels, score, macs or {})
    else:
        entries = _enter_by_budget(units, levels, score)
    return EntryLevels(
        len(levels), {name: units[name].expand(entry) for name, entry in zip(units, entries, strict=True)}
    )


def _score_units(name: str, units: Units, score: Score, macs: Mapping[str, int]) -> Tensor:
    """Return the scores of the units of one weight, which are compared across layers."""
    if score == "magnitude":
        return units.energy()
    importance = _lamp(units.energy())
    if score == "fisher":
        mean = (importance * units.energy()).sqrt()
        return _with_best(units, mean, torch.finfo(mean.dtype).max)
    if score == "lamp":
        return _with_best(units, importance, 1.0)
    # The Lagrangian of "most importance within a number of MACs" keeps a weight if its importance exceeds the
    # multiplier times its MACs. So the ratio of the two ranks the weights for every number of MACs at once.
    # A weight without MACs counts as one that multiplies once, as all weights of a classifier do.
    return importance / max(1.0, macs[name] / prod(units.shape))


def _with_best(units: Units, scores: Tensor, highest: float) -> Tensor:
    """Give a layer's best unit the highest score, so that no layer becomes empty as long as that is possible.

    The best one is chosen among those that the lowest level can use, and all levels with it.
    """
    if len(scores):
        energy = units.energy()
        if units.available is not None:
            energy = energy.masked_fill(units.available > units.available.min(), -torch.inf)
        scores[energy.argmax()] = highest
    return scores


def _lamp(energy: Tensor) -> Tensor:
    """Score units by layer-adaptive magnitude: each energy over the sum of all energies not smaller than it.

    Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021, equation 4. The
    largest unit of every layer scores 1, so no layer becomes empty before all layers have one unit left.
    """
    ordered, index = energy.sort(descending=True)
    exact = as_float64(ordered)
    not_smaller = exact.cumsum(0).clamp_min_(torch.finfo(torch.float64).tiny)
    return torch.empty_like(energy).scatter_(0, index, (exact / not_smaller).float().to(energy.device))


def _enter_by_global_rank(
    units: Mapping[str, Units], levels: Sequence[Level], score: Score, macs: Mapping[str, int]
) -> list[Tensor]:
    """Return the entry levels of the units of each weight, from one ranking over all layers."""
    scores = [_score_units(name, unit, score, macs) for name, unit in units.items()]
    targets = [
        kept_weights(sum(unit.count_usable(k) for unit in units.values()), level.sparsity)
        for k, level in enumerate(levels, start=1)
    ]
    available = [unit.available for unit in units.values()]
    sizes = _concatenate([unit.sizes for unit in units.values()])
    if sizes is None:
        return enter_best(targets, scores, available)
    lengths = [len(each) for each in scores]
    entries = _enter_blocks(targets, torch.cat(scores), sizes, _concatenate(available))
    return list(entries.split(lengths))


def _enter_by_budget(units: Mapping[str, Units], levels: Sequence[Level], score: Score) -> list[Tensor]:
    """Return the entry levels of the units of each weight, from a budget for each layer."""
    usable = {name: [unit.count_usable(k) for k in range(1, len(levels) + 1)] for name, unit in units.items()}
    budgets = layer_budgets({name: tuple(unit.shape) for name, unit in units.items()}, levels, score, usable)
    entries = []
    for name, unit in units.items():
        targets = [budget[name] for budget in budgets]
        if unit.sizes is None:
            entries += enter_best(targets, [unit.energy()], [unit.available])
        else:
            entries.append(_enter_blocks(targets, unit.energy(), unit.sizes, unit.available))
    return entries


def _concatenate(tensors: Sequence[Tensor | None]) -> Tensor | None:
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(found) if found else None


def _enter_blocks(targets: Sequence[int], scores: Tensor, sizes: Tensor, available: Tensor | None) -> Tensor:
    """Choose per level the blocks with the best scores; the first of equal blocks is preferred.

    The number of weights is the nearest one to the target that complete blocks reach. If some blocks are not
    available at level 1, a level keeps the blocks of the level below and adds the best of the remaining ones.

    Args:
        targets: per level, core first, the number of weights to keep.
        scores: (units,)
        sizes: number of weights of each block, int64 (units,).
        available: the lowest level that can use each block, uint8 (units,); None: level 1 can use all.

    Returns:
        Entry levels, uint8 (units,).
    """
    masks: list[Tensor] = []
    for level, target in enumerate(targets, start=1):
        usable = scores
        if available is not None:
            usable = scores.masked_fill(available > level, -torch.inf)
            if masks:
                usable = usable.masked_fill(masks[-1], torch.inf)
        masks.append(_top_blocks(usable, target, sizes))
    entry = torch.full_like(scores, len(targets) + 1, dtype=torch.uint8)
    for level in range(len(targets), 0, -1):
        entry[masks[level - 1]] = level
    return entry


def _top_blocks(scores: Tensor, target: int, sizes: Tensor) -> Tensor:
    """Return the mask of the best blocks whose number of weights is nearest to `target`."""
    order = scores.argsort(descending=True, stable=True)
    order = order[: int((scores > -torch.inf).sum())]
    reached = functional.pad(sizes[order].cumsum(0), (1, 0))  # weights kept by the first i blocks
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[: int((reached - target).abs().argmin())]] = True
    return mask


def kept_weights(total: int, sparsity: float) -> int:
    """Return the number of weights that a sparsity keeps of `total`, rounded to the nearest weight."""
    return round(total * (1 - sparsity))


def layer_budgets(
    shapes: Mapping[str, tuple[int, ...]],
    levels: Sequence[Level],
    score: Score,
    usable: Mapping[str, Sequence[int]] | None = None,
) -> list[dict[str, int]]:
    """Return how many weights each layer keeps at each level, never fewer than at a lower level.

    Args:
        shapes: layer -> shape of its weight.
        levels: core first, sparsities not increasing.
        score: `uniform` for the same density in all layers, otherwise `erk`.
        usable: layer -> per level, core first, the number of weights that the level can use; None: all.

    Returns:
        Per level a dict of layer -> number of weights, which add up to exactly the level's target.
    """
    lower = dict.fromkeys(shapes, 0)
    budgets = []
    for k, level in enumerate(levels):
        upper = {name: prod(shape) if usable is None else usable[name][k] for name, shape in shapes.items()}
        present = {name: shape for name, shape in shapes.items() if upper[name]}
        target = kept_weights(sum(upper.values()), level.sparsity)
        wanted = (
            _uniform(upper, target) if score == "uniform" else _erdos_renyi_kernel(present, upper, target)
        )
        lower = _apportion(dict.fromkeys(shapes, 0.0) | wanted, target, lower, upper)
        budgets.append(lower)
    return budgets


def _uniform(sizes: Mapping[str, int], target: int) -> dict[str, float]:
    total = sum(sizes.values())
    return {name: size * target / total for name, size in sizes.items()}


def _erdos_renyi_kernel(
    shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], target: int
) -> dict[str, float]:
    """Return the number of weights per layer for densities in proportion to sum(shape) / prod(shape).

    Evci et al., "Rigging the Lottery", ICML 2020, section 3 (Erdos-Renyi-Kernel). A density is at most 1;
    weights that a full layer has no room for are distributed over the other layers.

    Args:
        shapes: layer -> shape of its weight.
        sizes: layer -> number of weights that can be kept.
        target: number of weights that all layers keep together.
    """
    full: set[str] = set()
    while True:
        left = target - sum(sizes[name] for name in full)
        share = sum(sum(shape) for name, shape in shapes.items() if name not in full)
        scale = left / share if share else 0.0
        over = {n for n, s in shapes.items() if n not in full and sum(s) * scale > sizes[n]}
        if not over:
            return {n: float(sizes[n]) if n in full else sum(s) * scale for n, s in shapes.items()}
        full |= over


def _apportion(
    wanted: Mapping[str, float], target: int, lower: Mapping[str, int], upper: Mapping[str, int]
) -> dict[str, int]:
    """Round `wanted` to integers between the bounds that sum to `target` (largest remainders first)."""
    given = {name: min(max(int(wanted[name]), lower[name]), upper[name]) for name in wanted}
    by_need = sorted(wanted, key=lambda name: given[name] - wanted[name])
    while (gap := target - sum(given.values())) != 0:
        step = 1 if gap > 0 else -1
        order = by_need if step > 0 else by_need[::-1]
        open_names = [n for n in order if (given[n] < upper[n] if step > 0 else given[n] > lower[n])]
        each = max(1, abs(gap) // len(open_names))
        for name in open_names[: abs(gap)]:
            room = upper[name] - given[name] if step > 0 else given[name] - lower[name]
            given[name] += step * min(each, room)
    return given


def _select_n_of_m(
    weights: Weights, levels: Sequence[Level], m: int, available: Weights | None
) -> dict[str, Tensor]:
    """Return entry levels at which level k keeps the n_k largest weights of m consecutive input channels.

    All levels use the same ranking, so they nest.
    """
    n = len(levels)
    kept = [level.pattern.n if level.pattern.kind == "n:m" and level.sparsity > 0 else m for level in levels]
    tensors = {}
    for name, weight in weights.items():
        if not divides_into_groups(tuple(weight.shape), m, None if available is None else available[name]):
            tensors[name] = torch.ones_like(weight, dtype=torch.uint8)
            continue
        groups = weight.detach().abs().movedim(1, -1).unflatten(-1, (-1, m))  # (O, *K, I / m, m)
        rank = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        entry = torch.full_like(rank, n + 1, dtype=torch.uint8)
        for level in range(n, 0, -1):
            entry[rank < kept[level - 1]] = level
        tensors[name] = entry.flatten(-2).movedim(-1, 1).contiguous()
    return tensors


def divides_into_groups(shape: tuple[int, ...], m: int, available: Tensor | None = None) -> bool:
    """Whether the input channels of a weight divide into groups of m at every level.

    A weight that does not divide (a first layer of 3 channels, a depthwise layer, one where a narrower level
    cuts through a group) stays dense at every level.

    Args:
        shape: (out, in, ...)
        m: number of input channels of a group.
        available: the lowest level that can use each weight, uint8 in this shape; None: level 1 can use all.
    """
    if len(shape) < 2 or shape[1] % m:
        return False
    if available is None:
        return True
    groups = available.movedim(1, -1).unflatten(-1, (-1, m))
    return bool((groups == groups[..., :1]).all())
