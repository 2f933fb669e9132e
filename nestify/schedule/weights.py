"""Weight connections: from weights to entry levels.

Every score ranks units (single weights, or blocks), and each level keeps the best units of one ranking,
so levels nest whatever the score says. The N:M pattern ranks inside each group of M instead.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from nestify.model.entry_levels import EntryLevels
from nestify.recipe.level_options import Score
from nestify.recipe.levels import Level, Pattern

Weights = Mapping[str, Tensor]


@torch.no_grad()
def select_entry_levels(
    weights: Weights, levels: Sequence[Level], score: Score = "lamp", available: Weights | None = None
) -> EntryLevels:
    """Choose which level each weight enters at.

    Args:
        weights: maskable weights by name, each of shape (out, in, *kernel) or any other of two or more
            dimensions, on one device.
        levels: core level first, sparsities not increasing.
        score: `lamp` and `magnitude` rank all layers together; `uniform` and `erk` give each layer a
            budget and rank by magnitude inside it.
        available: by name, uint8 of the weight's shape: the lowest level that can use each weight; of the
            weights of a block all the same. None: level 1 can use all.

    Returns:
        Entry levels, none below what is available; with the unstructured pattern level k keeps exactly
        round((1 - sparsity_k) * total) of the weights that it can use, with blocks the nearest whole number
        of blocks.
    """
    pattern = next((level.pattern for level in levels if level.sparsity > 0), Pattern())
    if pattern.kind == "n:m":
        entry = _select_n_of_m(weights, levels, pattern.m, available)
        if available is not None:
            entry = {name: torch.maximum(tensor, available[name]) for name, tensor in entry.items()}
        return EntryLevels(len(levels), entry)
    units = {
        name: _Units(weight, pattern, None if available is None else available[name])
        for name, weight in weights.items()
    }
    if score in ("lamp", "magnitude"):
        kept = _keep_by_global_rank(units, levels, _lamp if score == "lamp" else _magnitude)
    else:
        kept = _keep_by_budget(units, levels, score)
    n = len(levels)
    return EntryLevels(n, {name: units[name].expand(entry) for name, entry in _enter(units, kept, n).items()})


class _Units:
    """The units of one weight: what a pattern keeps or drops together.

    Attributes:
        energy: mean squared weight of each unit, float32, flat.
        sizes: number of weights of each unit, int64, flat; ragged at the edges. None: all 1.
        available: the lowest level that can use each unit, uint8, flat. None: level 1 can use all.
    """

    def __init__(self, weight: Tensor, pattern: Pattern, available: Tensor | None = None) -> None:
        self.shape = weight.shape
        self.rows, self.cols = pattern.rows, pattern.cols
        squared = weight.detach().float().square()
        self.sizes: Tensor | None = None
        if pattern.kind == "block":
            self.sizes = self._reduce(torch.ones_like(squared)).long().flatten()
            squared = self._reduce(squared).flatten() / self.sizes
        self.energy = squared.flatten()
        self.available = None if available is None else available.flatten()
        if available is not None and self.sizes is not None:
            self.available = (self._reduce(available.long()).flatten() // self.sizes).to(torch.uint8)

    def _reduce(self, tensor: Tensor) -> Tensor:
        """Sum over blocks: (out, in, *kernel) -> (ceil(out / rows), ceil(in / cols), kernel)."""
        grid = tensor.reshape(self.shape[0], self.shape[1], -1)  # (O, I, K)
        down, across = -self.shape[0] % self.rows, -self.shape[1] % self.cols
        grid = functional.pad(grid, (0, 0, 0, across, 0, down))
        blocks: Tensor = grid.unflatten(1, (-1, self.cols)).unflatten(0, (-1, self.rows))
        return blocks.sum((1, 3))

    def expand(self, entry: Tensor) -> Tensor:
        """Entry levels of the units, flat -> entry levels of the weights, in the weight's shape."""
        if self.sizes is None:
            return entry.view(self.shape)
        grid = entry.view(-(-self.shape[0] // self.rows), -(-self.shape[1] // self.cols), -1)
        grid = grid.repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 1)
        return grid[: self.shape[0], : self.shape[1]].reshape(self.shape).contiguous()

    def usable(self, level: int) -> int:
        """Number of weights that a level can use."""
        if self.available is None:
            return prod(self.shape)
        within = self.available <= level
        return int(within.sum() if self.sizes is None else self.sizes[within].sum())


def _magnitude(energy: Tensor) -> Tensor:
    return energy


def _lamp(energy: Tensor) -> Tensor:
    """Layer-adaptive magnitude: each energy over the sum of those not smaller, itself included.

    Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021, equation 4. The
    largest weight of every layer scores 1, so no layer is emptied before all are down to one unit.
    """
    ordered, index = energy.sort(descending=True)
    not_smaller = ordered.cumsum(0, dtype=torch.float64).clamp_min_(torch.finfo(torch.float64).tiny)
    return torch.empty_like(energy).scatter_(0, index, (ordered / not_smaller).float())


def _keep_by_global_rank(
    units: Mapping[str, _Units], levels: Sequence[Level], score: Callable[[Tensor], Tensor]
) -> list[dict[str, Tensor]]:
    """Per level, a bool mask over the units of each weight, from one ranking over all layers."""
    scores = torch.cat([score(unit.energy) for unit in units.values()])
    lengths = [unit.energy.numel() for unit in units.values()]
    targets = [
        kept_weights(sum(unit.usable(k) for unit in units.values()), level.sparsity)
        for k, level in enumerate(levels, start=1)
    ]
    kept = _best(targets, scores, _joined([unit.sizes for unit in units.values()]), _availability(units))
    return [dict(zip(units, mask.split(lengths), strict=True)) for mask in kept]


def _keep_by_budget(
    units: Mapping[str, _Units], levels: Sequence[Level], score: Score
) -> list[dict[str, Tensor]]:
    """Per level, a bool mask over the units of each weight, from a budget of each layer."""
    usable = {name: [unit.usable(k) for k in range(1, len(levels) + 1)] for name, unit in units.items()}
    budgets = layer_budgets({name: tuple(unit.shape) for name, unit in units.items()}, levels, score, usable)
    kept: list[dict[str, Tensor]] = [{} for _ in levels]
    for name, unit in units.items():
        targets = [budget[name] for budget in budgets]
        for level, mask in enumerate(_best(targets, unit.energy, unit.sizes, unit.available)):
            kept[level][name] = mask
    return kept


def _availability(units: Mapping[str, _Units]) -> Tensor | None:
    return _joined([unit.available for unit in units.values()])


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(found) if found else None


def _best(
    targets: Sequence[int], scores: Tensor, sizes: Tensor | None, available: Tensor | None
) -> list[Tensor]:
    """Per level, for its target number of weights, the units with the best scores; ties go to the first.

    With units of one weight the count is exact. With blocks it is the nearest that whole blocks reach. Where
    not all is available at level 1, a level takes what the one below has and the best of the rest.
    """
    masks: list[Tensor] = []
    for level, target in enumerate(targets, start=1):
        usable = scores
        if available is not None:
            usable = scores.masked_fill(available > level, -torch.inf)
            if masks:
                usable = usable.masked_fill(masks[-1], torch.inf)
        masks.append(_top(usable, target) if sizes is None else _top_blocks(usable, target, sizes))
    return masks


def _top_blocks(scores: Tensor, target: int, sizes: Tensor) -> Tensor:
    order = scores.argsort(descending=True, stable=True)
    order = order[: int((scores > -torch.inf).sum())]
    reached = functional.pad(sizes[order].cumsum(0), (1, 0))  # weights kept by the first i blocks
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[: int((reached - target).abs().argmin())]] = True
    return mask


def _top(scores: Tensor, count: int) -> Tensor:
    """Mask of exactly `count` best scores; among equals the first ones, so that counts nest."""
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(scores.numel() - count + 1).values
    mask = scores > threshold
    ties = torch.nonzero(scores == threshold).flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask


def _enter(units: Mapping[str, _Units], kept: Sequence[Mapping[str, Tensor]], n: int) -> dict[str, Tensor]:
    """Entry levels of the units from the masks of the levels, core first."""
    entry = {}
    for name, unit in units.items():
        levels = torch.full_like(unit.energy, n + 1, dtype=torch.uint8)
        for level in range(n, 0, -1):
            levels[kept[level - 1][name]] = level
        entry[name] = levels
    return entry


def kept_weights(total: int, sparsity: float) -> int:
    """Number of weights that a sparsity keeps of `total`, to the nearest weight."""
    return round(total * (1 - sparsity))


def layer_budgets(
    shapes: Mapping[str, tuple[int, ...]],
    levels: Sequence[Level],
    score: Score,
    usable: Mapping[str, Sequence[int]] | None = None,
) -> list[dict[str, int]]:
    """How many weights each layer keeps at each level: exact in sum, never less than at a lower level.

    Args:
        usable: by layer and level, how many weights the level can use; all by default.
    """
    at_least = dict.fromkeys(shapes, 0)
    budgets = []
    for k, level in enumerate(levels):
        most = {name: prod(shape) if usable is None else usable[name][k] for name, shape in shapes.items()}
        there = {name: shape for name, shape in shapes.items() if most[name]}
        target = kept_weights(sum(most.values()), level.sparsity)
        wanted = _uniform(most, target) if score == "uniform" else _erdos_renyi_kernel(there, most, target)
        at_least = _apportion(dict.fromkeys(shapes, 0.0) | wanted, target, at_least, most)
        budgets.append(at_least)
    return budgets


def _uniform(sizes: Mapping[str, int], target: int) -> dict[str, float]:
    total = sum(sizes.values())
    return {name: size * target / total for name, size in sizes.items()}


def _erdos_renyi_kernel(
    shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], target: int
) -> dict[str, float]:
    """Density of a layer in proportion to sum(shape) / prod(shape), at most 1.

    Evci et al., "Rigging the Lottery", ICML 2020, section 3 (Erdos-Renyi-Kernel). What a full layer
    cannot take goes to the others.

    Args:
        shapes: of the layers. `sizes`: how many weights of each can be kept.
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
    """Whole numbers near `wanted`, between the bounds, that sum to `target` (largest remainders first)."""
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
    """Per group of m consecutive input channels, the n_k largest weights; one ranking, so they nest."""
    n = len(levels)
    kept = [level.pattern.n if level.pattern.kind == "n:m" and level.sparsity > 0 else m for level in levels]
    tensors = {}
    for name, weight in weights.items():
        if not takes_n_of_m(tuple(weight.shape), m, None if available is None else available[name]):
            tensors[name] = torch.ones_like(weight, dtype=torch.uint8)
            continue
        groups = weight.detach().abs().movedim(1, -1).unflatten(-1, (-1, m))  # (O, *K, I / m, m)
        rank = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        entry = torch.full_like(rank, n + 1, dtype=torch.uint8)
        for level in range(n, 0, -1):
            entry[rank < kept[level - 1]] = level
        tensors[name] = entry.flatten(-2).movedim(-1, 1).contiguous()
    return tensors


def takes_n_of_m(shape: tuple[int, ...], m: int, available: Tensor | None = None) -> bool:
    """Whether a weight of shape (out, in, ...) divides into groups of m input channels at every level.

    One that does not (a first layer of 3 channels, a depthwise layer, a narrower level that cuts through a
    group) stays dense at every level.

    Args:
        available: the lowest level that can use each weight, uint8 of the shape.
    """
    if len(shape) < 2 or shape[1] % m:
        return False
    if available is None:
        return True
    groups = available.movedim(1, -1).unflatten(-1, (-1, m))
    return bool((groups == groups[..., :1]).all())
