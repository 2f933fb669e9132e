"""Forward passes of levels in training: with gradient checkpointing, and compiled.

With gradient checkpointing (timm's `set_grad_checkpointing`) the blocks store no activations; the backward
pass computes them again, with the tensors that the network holds at that time. After the forward pass of a
level these would be the tensors of the full level, so here the network holds the level's tensors until the
level's backward pass has ended.
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
def recompute_activations(nested: NestedModel) -> Iterator[None]:
    """Turn on gradient checkpointing of the network until the end of the block.

    Raises:
        UnsupportedModelError: if timm does not support it for this model.
    """
    network = nested.network
    switch = getattr(network, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise UnsupportedModelError("the model has no set_grad_checkpointing")
        switch(True)
    except Exception as error:  # timm's models raise AssertionError if they do not support it
        reason = f" ({error})" if str(error) else ""
        name = nested.spec.architecture
        raise UnsupportedModelError(
            f"train.grad_checkpointing = true: timm does not support it for {name}{reason}; leave it out"
        ) from error
    try:
        yield
    finally:
        switch(False)


def forward_and_use(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    images: Tensor,
    use: Callable[[Tensor], None],
    autocast: Callable[[], AbstractContextManager[object]],
) -> None:
    """Run a level, and pass its logits to a function while the network still holds the level's tensors.

    Args:
        module, tensors: the level, as `NestedModel.view` returns it.
        images: (B, C, H, W).
        use: receives the logits, (B, classes), and may run the backward pass.
        autocast: makes the context of the forward pass; `use` runs outside it.
    """
    held = {f"module.{name}": tensor for name, tensor in tensors.items()}
    functional_call(_ForwardAndUse(module, use, autocast), held, (images,), tie_weights=False)


class _ForwardAndUse(nn.Module):
    """A module that passes the output of another module to a function, within its own forward pass."""

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
    """The levels of a nested model in training, each compiled by torch.compile when it first runs.

    Masks are applied outside the compiled program, so a level's masked weights exist from its forward pass to
    its backward pass. A level is compiled again when the set of weights that it uses without a mask changes.
    """

    def __init__(self) -> None:
        self._programs: dict[int, Callable[[Mapping[str, Tensor], Tensor], Tensor]] = {}
        self._graphs_before = _count_graphs()

    def run(self, level: int, module: nn.Module, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Return the logits (B, classes of the level) for images (B, C, H, W).

        Args:
            level: the level to run, counted from 1.
            module, tensors: the level, as `NestedModel.view` returns it.
            images: (B, C, H, W).
        """
        if level not in self._programs:
            self._programs[level] = torch.compile(_make_forward(module, level))
        return self._programs[level](tensors, images)

    def count_graphs(self) -> int:
        """Return the number of programs compiled so far: one per level, and one for each recompilation."""
        return _count_graphs() - self._graphs_before


def _make_forward(module: nn.Module, level: int) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
    def forward(tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
        logits: Tensor = functional_call(module, dict(tensors), (images,), tie_weights=False)
        return logits

    # torch.compile caches programs by code object. If the levels shared one code object, torch would treat
    # them as one function whose shapes vary.
    forward.__code__ = forward.__code__.replace(co_name=f"level_{level}")
    return forward


def _count_graphs() -> int:
    """Return the number of programs that torch.compile has made in this Python process."""
    return int(counters["stats"]["unique_graphs"])
