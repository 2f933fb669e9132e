"""Masks that define labels: an element of a tensor is kept if all channels that label it are kept."""

from math import prod

import numpy as np
from numpy.typing import NDArray

from nestify.model.graph.labels import Algebra, ChannelLabels, Shape, make_labels

Mask = NDArray[np.bool_]


def mask_of(algebra: Algebra, labels: ChannelLabels, kept: Mask) -> Mask:
    """Return the mask of a tensor's kept elements, given the mask of the kept sets."""
    mask = np.ones(labels.shape, dtype=bool)
    for block in labels.blocks:
        inside = kept[algebra.sets.roots(block.nodes)]
        mask &= inside.reshape([n if d in block.dims else 1 for d, n in enumerate(labels.shape)])
    return mask


def some_kept(algebra: Algebra, seed: int) -> Mask:
    """Choose about half of all sets at random, and the frozen ones."""
    kept = np.random.default_rng(seed).random(len(algebra.sets)) < 0.5
    kept[0] = True
    return kept


def new_labels(algebra: Algebra, shape: Shape, live: set[int], joint: bool) -> ChannelLabels:
    """Make labels with a node per index of the dimensions in `live`, or per element if `joint`."""
    if joint:
        flat = make_labels((prod(shape),), {0: algebra.sets.fresh(prod(shape))})
        return algebra.reshape(flat, shape)
    return make_labels(shape, {d: algebra.sets.fresh(shape[d]) for d in live})
