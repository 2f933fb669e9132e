"""What labels mean: an element of a tensor is kept where all the channels that label it are."""

from math import prod

import numpy as np
from numpy.typing import NDArray

from nestify.model.graph.labels import Algebra, ChannelLabels, Shape, of_dims

Mask = NDArray[np.bool_]


def mask_of(algebra: Algebra, labels: ChannelLabels, kept: Mask) -> Mask:
    """Which elements of a tensor stay where `kept` says which sets do."""
    mask = np.ones(labels.shape, dtype=bool)
    for block in labels.blocks:
        inside = kept[algebra.sets.roots(block.nodes)]
        mask &= inside.reshape([n if d in block.dims else 1 for d, n in enumerate(labels.shape)])
    return mask


def some_kept(algebra: Algebra, seed: int) -> Mask:
    """Keep about half of all sets, and the frozen ones."""
    kept = np.random.default_rng(seed).random(len(algebra.sets)) < 0.5
    kept[0] = True
    return kept


def labelled(algebra: Algebra, shape: Shape, live: set[int], joint: bool) -> ChannelLabels:
    """Labels with a node per index of the dimensions in `live`, or per element of the whole tensor."""
    if joint:
        flat = of_dims((prod(shape),), {0: algebra.sets.fresh(prod(shape))})
        return algebra.reshape(flat, shape)
    return of_dims(shape, {d: algebra.sets.fresh(shape[d]) for d in live})
