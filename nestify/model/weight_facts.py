"""What is known about the weights of a network beside their values."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class WeightFacts:
    """What the ranking of weights needs to know beside their values; copies of a model share it.

    Attributes:
        macs: parameter name -> multiply-accumulates per image in the full network.
        sensitivity: parameter name -> Fisher information of each weight, float32 in the weight's shape; empty
            if it was not measured.
    """

    macs: Mapping[str, int] = field(default_factory=dict)
    sensitivity: Mapping[str, Tensor] = field(default_factory=dict)

    def __deepcopy__(self, memo: object) -> "WeightFacts":
        return self
