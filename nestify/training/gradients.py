"""How fast each weight learns: as fast as it would in the levels that use it alone.

The gradient of a shared weight is the sum over levels of a_k g_k, with level weights a_k that sum to 1. One
that only the full level uses gets a_n g_n of it, a fraction of what it would get if that level were trained
alone. Here each gradient is divided by the sum of the a_k of those levels that use the weight, which makes it
their weighted mean.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nestify.nested_model import NestedModel


class MeanGradients:
    """Makes the gradients of a nested model means over the levels that use each weight.

    Args:
        level_weights: a_k by level, core first.
    """

    def __init__(self, nested: NestedModel, level_weights: Sequence[float]) -> None:
        self._nested = nested
        users = [sum(level_weights[level:]) for level in range(nested.n_levels)]
        self._factors = torch.tensor([1.0, *(1 / share if share else 1.0 for share in users), 1.0])
        shared = {
            name: tensor for name, tensor in nested.shared_tensors().items() if name not in nested.owned
        }
        structure = nested.structure
        self._fixed: dict[str, Tensor] = {} if structure is None else structure.entry_levels(shared)

    def apply(self) -> None:
        """Scale the gradients that all levels have added to."""
        for name, entry in (self._fixed | dict(self._nested.entry.items())).items():
            gradient = self._nested.shared_tensor(name).grad
            if gradient is not None:
                factors = self._factors.to(gradient.device, gradient.dtype)
                gradient.mul_(factors[entry.to(gradient.device).int()])
