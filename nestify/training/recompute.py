"""Gradient checkpointing: blocks keep no activations for their backward, which computes them again.

The network does that by itself (timm's `set_grad_checkpointing`), but with the tensors that it holds by then,
and once the forward of a level is over these are the full level's. Here a level keeps its tensors until its
backward has ended.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn
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
    module, tensors = nested.view(level, images.device, stand_ins=False)
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
