"""Gradient checkpointing: blocks keep no activations for their backward, which computes them again.

The network does that by itself (timm's `set_grad_checkpointing`), but with the tensors that it holds by then,
and once the forward of a level is over these are the full level's. Here a level keeps its tensors until its
backward has ended.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call

from nestify.errors import UnsupportedModelError
from nestify.model.nested_model import NestedModel


@contextmanager
def recomputing(nested: NestedModel) -> Iterator[None]:
    """Let the network compute activations again in the backward, until the end.

    Raises:
        UnsupportedModelError: if timm does not offer it for this model.
    """
    network = nested.network
    switch = getattr(network, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise UnsupportedModelError("it has no set_grad_checkpointing")
        switch(True)
    except Exception as error:  # timm's models refuse by an assert
        reason = f" ({error})" if str(error) else ""
        name = nested.spec.architecture
        raise UnsupportedModelError(
            f"train.grad_checkpointing = true: timm does not offer it for {name}{reason}; leave it out"
        ) from error
    try:
        yield
    finally:
        switch(False)


def while_held(
    nested: NestedModel,
    images: Tensor,
    level: int,
    use: Callable[[Tensor], None],
    autocast: Callable[[], AbstractContextManager[object]],
) -> None:
    """Give a level's logits, (B, classes), to a function while the network still holds the level's tensors.

    Masked weights are made once, and exist until then.

    Args:
        images: (B, C, H, W).
        use: may run a backward.
        autocast: makes the context of the forward pass alone.
    """
    module, tensors = nested.view(level, images.device, lazy=False)
    held = {f"module.{name}": tensor for name, tensor in tensors.items()}
    functional_call(_Used(module, use, autocast), held, (images,), tie_weights=False)


class _Used(nn.Module):
    """A module whose output is used as soon as it is there."""

    def __init__(
        self,
        module: nn.Module,
        use: Callable[[Tensor], None],
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        super().__init__()
        self.module = module
        self._use, self._autocast = use, autocast

    def forward(self, images: Tensor) -> None:
        with self._autocast():
            logits = self.module(images)
        self._use(logits)


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
        module, tensors = self._nested.view(level, images.device, lazy=False)
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
