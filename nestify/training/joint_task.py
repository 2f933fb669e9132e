"""All levels in one graph, for loops that run the backward pass themselves."""

from typing import Any

from torch import Tensor

from nestify.training.gradients import LevelGradients
from nestify.training.task import NestedTask


class JointTask(NestedTask):
    """A task whose `forward` returns the joint loss; its backward pass gives the gradients of a step.

    They are those of `NestedTask.backward` followed by `LevelGradients.apply`, but the graphs of all levels
    are in memory at the same time. The arguments are those of `NestedTask`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        nested = self.trainable_module
        self._weights: dict[int, float] = {}
        scale = LevelGradients(nested, self.level_weights).scaled
        for name, tensor in nested.shared_tensors().items():
            if name not in nested.own_names and tensor.requires_grad:
                tensor.register_hook(lambda gradient, name=name: scale(name, gradient))
        for level in range(1, nested.n_levels + 1):
            for tensor in nested.own_tensors(level).values():
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient, level=level: gradient / self._weights[level])

    def forward(self, input: Tensor, target: Any) -> dict[str, Tensor]:
        """Return the weighted loss of all levels, 0-d, as `loss`, and the full level's logits as `output`."""
        self._weights = dict(self.draw_levels())
        return super().forward(input, target)
