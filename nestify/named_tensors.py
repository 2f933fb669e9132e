"""Tensors by name as a module of their own."""

from collections.abc import Iterator

from torch import Tensor, nn


class NamedTensors(nn.Module):
    """Named tensors as a module, so that they follow `.to()`, `state_dict` and copies.

    A tensor is a parameter where its namesake in `like` is one, else a buffer. Module attributes cannot
    have dots in their names, so they are kept with slashes.
    """

    def __init__(self, tensors: dict[str, Tensor], like: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            key = name.replace(".", "/")
            if like is not None and isinstance(like[name], nn.Parameter):
                self.register_parameter(key, nn.Parameter(tensor, requires_grad=like[name].requires_grad))
            else:
                self.register_buffer(key, tensor)

    def __getitem__(self, name: str) -> Tensor:
        tensor = getattr(self, name.replace(".", "/"))
        assert isinstance(tensor, Tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items())

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of original name and tensor."""
        for key, tensor in [*self._parameters.items(), *self._buffers.items()]:
            assert tensor is not None
            yield key.replace("/", "."), tensor
