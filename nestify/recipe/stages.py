"""The stages of a training: which levels are trained together, around frozen ones. Does not import torch."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nestify.recipe.level_options import LevelOptions


class Stage(NamedTuple):
    """A part of the training: levels that are trained together, around the levels below, which are frozen.

    Attributes:
        frozen: number of frozen levels, from the core on.
        last: the highest level that is trained.
    """

    frozen: int
    last: int


def training_stages(levels: "Sequence[LevelOptions]") -> list[Stage]:
    """Return the stages of a training: one, and one more for each level that is frozen below others."""
    ends = [k for k, level in enumerate(levels, start=1) if level.freeze and k < len(levels)]
    return [Stage(*pair) for pair in pairwise([0, *ends, len(levels)])]
