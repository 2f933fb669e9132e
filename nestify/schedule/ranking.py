"""The best weights of all layers, found without sorting or joining the layers.

The scores are not negative, so that their bits, read as integers, are in the same order. Two counts of bits
over all layers find the score of the last weight that a level keeps: one of the upper 16 bits, and one of the
lower 16 bits of the scores whose upper bits are those found. Beside the scores this takes the memory of one
layer.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_HALF = 2**16


def enter_best(
    targets: Sequence[int], scores: Sequence[Tensor], available: Sequence[Tensor | None]
) -> list[Tensor]:
    """Choose the weights of each level: the best scores of all layers; the first of equal weights.

    A level keeps the weights of the level below, and adds the best of the remaining ones that it can use.

    Args:
        targets: per level, core first, the number of weights to keep, not decreasing, and at most as many as
            the level can use.
        scores: of each layer, float32 (weights,), not negative.
        available: of each layer, the lowest level that can use each weight, uint8 (weights,); None: level 1
            can use all.

    Returns:
        Of each layer the entry levels, uint8 (weights,).
    """
    unused = len(targets) + 1
    entries = [torch.full_like(score, unused, dtype=torch.uint8) for score in scores]

    def is_open(layer: int, level: int) -> Tensor:
        """Return which weights of a layer the level can still add."""
        entry, lowest = entries[layer], available[layer]
        return entry == unused if lowest is None else (entry == unused) & (lowest <= level)

    kept = 0
    for level, target in enumerate(targets, start=1):
        if target <= kept:
            continue
        last, ties = _find_last(
            lambda level=level: (  # type: ignore[misc]
                _bits(score)[is_open(layer, level)] for layer, score in enumerate(scores)
            ),
            target - kept,
        )
        for layer, score in enumerate(scores):
            bits, choice = _bits(score), is_open(layer, level)
            if ties:
                places = torch.nonzero(choice & (bits == last)).flatten()[:ties]
                entries[layer][places] = level
                ties -= len(places)
            entries[layer].masked_fill_(choice & (bits > last), level)
        kept = target
    return entries


def _find_last(layers: Callable[[], Iterable[Tensor]], count: int) -> tuple[int, int]:
    """Find the `count`-th largest of the numbers of all layers.

    Args:
        layers: returns the numbers, int32, not negative; is called twice.
        count: 1 or more.

    Returns:
        The number, and how many that are equal to it belong to the `count` largest. If there are no more than
        `count` numbers, -1 and 0.
    """
    upper = sum(torch.bincount(bits // _HALF, minlength=_HALF) for bits in layers())
    assert isinstance(upper, Tensor)
    if int(upper.sum()) <= count:
        return -1, 0
    half, count = _pick(upper, count)
    lower = sum(torch.bincount(bits[bits // _HALF == half] % _HALF, minlength=_HALF) for bits in layers())
    assert isinstance(lower, Tensor)
    rest, count = _pick(lower, count)
    return half * _HALF + rest, count


def _pick(counts: Tensor, count: int) -> tuple[int, int]:
    """Return the bin of the `count`-th largest number, and its place in the bin, from 1."""
    reached = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, count))
    return len(counts) - 1 - place, count - int(reached[place] - counts[len(counts) - 1 - place])


def _bits(score: Tensor) -> Tensor:
    return score.view(torch.int32) & 0x7FFFFFFF  # a NaN of a run that diverged may have a sign
