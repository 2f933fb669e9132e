"""Which blocks a level keeps: blocks are ranked once, and every level keeps the first of them.

So a level keeps all blocks of a shallower one, whatever the ranking says.
"""

from collections.abc import Callable, Sequence
from math import ceil

from nestify.model.graph.blocks import Block, Stage

Ranking = tuple[Block, ...]
"""All blocks, the one to keep longest first."""
Loss = Callable[[Sequence[Block]], float]
"""The loss on calibration images of the network that skips these blocks."""


def kept_blocks(ranking: Ranking, depth: float) -> frozenset[Block]:
    """The first ceil(depth * n) of n blocks.

    Args:
        depth: share of the blocks, above 0 and at most 1.
    """
    assert 0 < depth <= 1
    return frozenset(ranking[: ceil(depth * len(ranking) - 1e-9)])  # 0.28 * 25 is above 7


def rank_evenly(stages: Sequence[Stage]) -> Ranking:
    """Every level keeps about the same share of each stage, spread over it; one block of each goes last."""
    order = [
        (rank / len(stage.blocks), number, stage.blocks[place])
        for number, stage in enumerate(stages)
        for rank, place in enumerate(_spread(len(stage.blocks)))
    ]
    return tuple(block for _, _, block in sorted(order, key=lambda entry: entry[:2]))


def _spread(n: int) -> list[int]:
    """0 .. n - 1, each as far as can be from those before it and from both ends.

    Of equals the one that is farther from those before it, then the lower.
    """
    order: list[int] = []

    def distances(place: int) -> tuple[int, int]:
        before = min((abs(place - other) for other in order), default=n)
        return min(before, place + 1, n - place), before

    while len(order) < n:
        order.append(max((place for place in range(n) if place not in order), key=distances))
    return order


def rank_by_loss(blocks: Sequence[Block], loss: Loss, *, again: bool = False) -> Ranking:
    """Keep longest what the loss needs most.

    Args:
        again: measure the blocks that are left again whenever one is skipped, as one whose neighbour is gone
            can become important: n (n + 1) / 2 - 1 losses. Otherwise each is skipped alone: n losses.
    """
    if not again:
        losses = {block: loss([block]) for block in blocks}
        return tuple(sorted(blocks, key=lambda block: losses[block], reverse=True))
    left, gone = list(blocks), list[Block]()
    while len(left) > 1:
        least = min(left, key=lambda block: loss([*gone, block]))
        left.remove(least)
        gone.append(least)
    return (*left, *reversed(gone))
