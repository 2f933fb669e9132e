"""Masked weights that exist only while an operator uses them.

Training level k needs `weight * (entry <= k)` in the forward and again in the backward. Keeping the products
of all layers from one to the other would cost a copy of the weights; making each product anew in the
backward costs one multiplication per weight, which is little beside the operator that uses it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nestify.model.entry_levels import entry_mask


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


class _Mask(torch.autograd.Function):
    """weight * (entry <= level), with the same mask on the gradient; keeps no mask of its own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, entry: Tensor, level: int) -> Tensor:
        ctx.save_for_backward(entry)
        ctx.level = level
        return weight * entry_mask(entry, level)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (entry,) = ctx.saved_tensors
        return grads[0] * entry_mask(entry, ctx.level), None, None


def masked_weight(weight: Tensor, entry: Tensor, level: int) -> Tensor:
    """The weight at a level, 0 where `entry` is above it; differentiable.

    Args:
        weight: the shared weight. `entry`: its entry levels, uint8 of the same shape.
        level: 1-based.
    """
    product: Tensor = _Mask.apply(weight, entry, level)
    return product


class MaskedWeight(torch.Tensor):
    """Stands in for a masked weight: any torch function that gets it works on the product.

    The product is made for the call and freed after it; what autograd saves of it for the backward is made
    again there.

    Args:
        weight: the shared weight.
        entry: its entry levels, uint8 of the same shape.
        level: 1-based.
    """

    weight: Tensor
    entry: Tensor
    level: int

    @staticmethod
    def __new__(cls, weight: Tensor, entry: Tensor, level: int) -> "MaskedWeight":
        stand_in: MaskedWeight = weight.detach().as_subclass(cls)
        stand_in.weight, stand_in.entry, stand_in.level = weight, entry, level
        return stand_in

    def product(self) -> Tensor:
        """The masked weight as an ordinary tensor, differentiable."""
        return masked_weight(self.weight, self.entry, self.level)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func` with products in the place of their stand-ins."""
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(func, "__name__", "") == "__get__":  # shape, dtype, device, ...
                return func(*args, **(kwargs or {}))
            made: dict[int, MaskedWeight] = {}

            def make(stand_in: MaskedWeight) -> Tensor:
                product = stand_in.product()
                made[product.data_ptr()] = stand_in
                return product

            args, named = tree_map_only(MaskedWeight, make, (args, dict(kwargs or {})))
            with torch.autograd.graph.saved_tensors_hooks(_pack(made), _unpack):
                return func(*args, **named)


class _Remade:
    """A saved tensor that is a product, or a view of one: how to make it again."""

    def __init__(self, stand_in: MaskedWeight, view: Tensor) -> None:
        self.stand_in = stand_in
        self.size, self.stride, self.offset = view.size(), view.stride(), view.storage_offset()

    def make(self) -> Tensor:
        with torch.no_grad():
            product = self.stand_in.product()
        return product.as_strided(self.size, self.stride, self.offset)


def _pack(made: Mapping[int, MaskedWeight]) -> Callable[[Tensor], Tensor | _Remade]:
    def pack(saved: Tensor) -> Tensor | _Remade:
        pointer = saved.untyped_storage().data_ptr()
        return _Remade(made[pointer], saved) if pointer in made else saved

    return pack


def _unpack(saved: Tensor | _Remade) -> Tensor:
    return saved.make() if isinstance(saved, _Remade) else saved


class WholeWeights:
    """Which weights a level uses whole, so that they need no mask.

    Looked up again whenever an entry tensor changed, by whatever way (an average of models writes into
    the buffers directly).
    """

    def __init__(self, entry: NamedTensors, n_levels: int) -> None:
        self._entry, self._n_levels = entry, n_levels
        self._seen: tuple[object, tuple[frozenset[str], ...]] | None = None

    def at(self, level: int) -> frozenset[str]:
        """Their names, at a level."""
        state = identity(tensor for _, tensor in self._entry.items())
        if self._seen is None or self._seen[0] != state:
            highest = {name: int(entry.max()) if entry.numel() else 1 for name, entry in self._entry.items()}
            whole = (
                frozenset(n for n, top in highest.items() if top <= k + 1) for k in range(self._n_levels)
            )
            self._seen = (state, tuple(whole))
        return self._seen[1][level - 1]


def identity(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """What changes when a tensor is replaced or written to."""
    return tuple((id(t), -1 if t.is_inference() else t._version) for t in tensors)
