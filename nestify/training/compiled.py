"""Forward passes of training through torch.compile, one program per level."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call

from nestify.model.nested_model import NestedModel


class CompiledLevels:
    """The levels of a nested model in training, each compiled when it first runs.

    Masks are applied before the compiled part, so that a level's masked weights exist from its forward to its
    backward. A level is compiled again where other weights than before are whole in it.
    """

    def __init__(self, nested: NestedModel) -> None:
        self._nested = nested
        self._programs: dict[int, Callable[[Mapping[str, Tensor], Tensor], Tensor]] = {}
        self._graphs_before = _graphs()

    def __call__(self, images: Tensor, level: int) -> Tensor:
        """Logits (B, classes of the level) for images (B, C, H, W)."""
        module, tensors = self._nested.view(level, images.device, stand_ins=False)
        if level not in self._programs:
            self._programs[level] = torch.compile(_caller(module, level))
        return self._programs[level](tensors, images)

    def graphs(self) -> int:
        """How many programs torch has made since: one per level, and more where it compiled again."""
        return _graphs() - self._graphs_before


def _caller(module: nn.Module, level: int) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
    def call(tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
        logits: Tensor = functional_call(module, dict(tensors), (images,), tie_weights=False)
        return logits

    # torch keeps programs by code object, and takes those of one object for one function whose shapes vary.
    call.__code__ = call.__code__.replace(co_name=f"level_{level}")
    return call


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])
