"""How fast each weight learns: as if the levels that use it were one larger batch.

The gradient of a shared weight is the sum over levels of a_k g_k, with level weights a_k that sum to 1. One
that only the full level uses gets a_n g_n of it, a fraction of what it would get if that level were trained
alone. Here each gradient is divided by the sum of the a_k of those levels that use the weight, which makes it
their weighted mean, and multiplied by the square root of their number m: a mean over m times as many images
goes with a learning rate that is so much higher (Krizhevsky, arXiv 1404.5997, on batch sizes).
"""

from collections.abc import Sequence
from math import sqrt

import torch

from nestify.model.nested_model import NestedModel


class LevelGradients:
    """Scales the gradients of a nested model by what the levels that use each weight need.

    Args:
        level_weights: a_k by level, core first; a level of weight 0 is not trained and does not count.
    """

    def __init__(self, nested: NestedModel, level_weights: Sequence[float]) -> None:
        self._nested = nested
        above = [[a for a in level_weights[level:] if a] for level in range(nested.n_levels)]
        factors = [sqrt(len(users)) / sum(users) if users else 1.0 for users in above]
        device = next(nested.parameters()).device
        # entry levels count from 1; n + 1 is no level's
        self._factors = torch.tensor([1.0, *factors, 1.0], device=device)
        shared = {
            name: tensor for name, tensor in nested.shared_tensors().items() if name not in nested.owned
        }
        structure = nested.structure
        fixed = {} if structure is None else structure.entry_levels(shared)
        self._fixed = {name: entry.to(device) for name, entry in fixed.items()}

    def apply(self) -> None:
        """Scale the gradients that all levels have added to."""
        for name, entry in (self._fixed | dict(self._nested.entry.items())).items():
            gradient = self._nested.shared_tensor(name).grad
            if gradient is not None:
                factors = self._factors.to(gradient.dtype)
                # four times as fast as factors[entry.int()]
                gradient.mul_(factors.index_select(0, entry.flatten().int()).view(entry.shape))
