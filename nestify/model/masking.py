"""Masked weights that exist only while an operator uses them.

Training level k needs `weight * (entry <= k)` in the forward pass and again in the backward pass. Keeping
the products of all layers in between would cost a copy of the weights. Computing each product again in the
backward pass costs one multiplication per weight, which is little compared with the operator that uses it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only


class NamedTensors(nn.Module):
    """A module that holds named tensors, so that `.to()`, `state_dict` and copies include them.

    Names of module attributes cannot contain dots, so dots are stored as slashes.

    Args:
        tensors: name -> tensor.
        like: name -> tensor; a tensor becomes a parameter if the one of its name in `like` is a parameter,
            otherwise a buffer. With None, all tensors become buffers.
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
        """Iterate over pairs of original name and tensor."""
        for key, tensor in [*self._parameters.items(), *self._buffers.items()]:
            assert tensor is not None
            yield key.replace("/", "."), tensor


_LAYERS = frozenset(
    {
        *(torch.conv1d, torch.conv2d, torch.conv3d, functional.linear),
        *(torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding, torch.ops.aten.linear.default),
    }
)
"""Functions whose gradient of the weight is a new tensor, which may be masked in place."""

_PIECE = 2**17
"""Weights that are masked at a time; their masks fit in a processor's cache."""


class _Mask(torch.autograd.Function):
    """The product weight * (entry <= level), with the same mask on the gradient; saves no mask."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, entry: Tensor, level: int, in_place: bool) -> Tensor:
        ctx.save_for_backward(entry)
        ctx.level, ctx.in_place = level, in_place
        return _times_mask(weight, entry, level)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (entry,) = ctx.saved_tensors
        if ctx.in_place and not torch.is_grad_enabled():
            return _mask_in_place(grads[0], entry, ctx.level), None, None, None
        return _times_mask(grads[0], entry, ctx.level), None, None, None


def _times_mask(tensor: Tensor, entry: Tensor, level: int) -> Tensor:
    """Return tensor * (entry <= level).

    The mask is made as bytes, then copied to the tensor's type, and becomes the product. On a CPU this takes
    less than a third of the time of a product with a bool mask, which torch neither makes nor reads as fast.
    """
    mask = torch.le(entry, level, out=torch.empty_like(entry))
    return torch.empty_like(tensor).copy_(mask).mul_(tensor)


def _mask_in_place(tensor: Tensor, entry: Tensor, level: int) -> Tensor:
    """Multiply a tensor by (entry <= level), some rows at a time, and return it."""
    rows = max(1, _PIECE // max(1, entry[:1].numel()))
    mask, factors = torch.empty_like(entry[:rows]), torch.empty_like(tensor[:rows])
    for values, levels in zip(tensor.split(rows), entry.split(rows), strict=True):
        n = len(levels)
        torch.le(levels, level, out=mask[:n])
        values.mul_(factors[:n].copy_(mask[:n]))
    return tensor


def masked_weight(weight: Tensor, entry: Tensor, level: int, in_place: bool = False) -> Tensor:
    """Return a level's weight: `weight`, with zeros where `entry` is above the level; differentiable.

    Args:
        weight: the shared weight.
        entry: its entry levels, uint8 in the same shape.
        level: 1-based.
        in_place: whether the gradient of the result may be overwritten, because nothing else uses it.
    """
    product: Tensor = _Mask.apply(weight, entry, level, in_place)
    return product


class MaskedWeight(torch.Tensor):
    """A masked weight that is computed only when a torch function uses it.

    The masked weight is computed for the call and freed after it. If autograd saves it for the backward
    pass, it is computed again there.

    Args:
        weight: the shared weight.
        entry: its entry levels, uint8 in the same shape.
        level: 1-based.
    """

    weight: Tensor
    entry: Tensor
    level: int

    @staticmethod
    def __new__(cls, weight: Tensor, entry: Tensor, level: int) -> "MaskedWeight":
        lazy: MaskedWeight = weight.detach().as_subclass(cls)
        lazy.weight, lazy.entry, lazy.level = weight, entry, level
        return lazy

    def product(self, in_place: bool = False) -> Tensor:
        """Compute the masked weight as an ordinary tensor; differentiable; see `masked_weight`."""
        return masked_weight(self.weight, self.entry, self.level, in_place)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func` with every masked weight replaced by its product."""
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(func, "__name__", "") == "__get__":  # shape, dtype, device, ...
                return func(*args, **(kwargs or {}))
            products: dict[int, MaskedWeight] = {}

            def compute(lazy: MaskedWeight) -> Tensor:
                product = lazy.product(in_place=func in _LAYERS)
                products[product.data_ptr()] = lazy
                return product

            args, named = tree_map_only(MaskedWeight, compute, (args, dict(kwargs or {})))
            with torch.autograd.graph.saved_tensors_hooks(_pack(products), _unpack):
                return func(*args, **named)


class _SavedProduct:
    """The description of a saved product, or of a view of one, from which it is computed again."""

    def __init__(self, lazy: MaskedWeight, view: Tensor) -> None:
        self.lazy = lazy
        self.size, self.stride, self.offset = view.size(), view.stride(), view.storage_offset()

    def compute(self) -> Tensor:
        with torch.no_grad():
            product = self.lazy.product()
        return product.as_strided(self.size, self.stride, self.offset)


def _pack(products: Mapping[int, MaskedWeight]) -> Callable[[Tensor], Tensor | _SavedProduct]:
    def pack(saved: Tensor) -> Tensor | _SavedProduct:
        pointer = saved.untyped_storage().data_ptr()
        return _SavedProduct(products[pointer], saved) if pointer in products else saved

    return pack


def _unpack(saved: Tensor | _SavedProduct) -> Tensor:
    return saved.compute() if isinstance(saved, _SavedProduct) else saved


class UnmaskedWeights:
    """A cached lookup of the weights of which a level masks nothing.

    The lookup is repeated whenever an entry tensor has changed, however it was changed: a model average,
    for example, writes into the buffers directly.

    Args:
        entry: the entry levels of the masked weights.
        cut: cuts a level's part out of a tensor, by level, name and tensor; None if the level lacks it.
    """

    def __init__(self, entry: NamedTensors, cut: Callable[[int, str, Tensor], Tensor | None]) -> None:
        self._entry, self._cut = entry, cut
        self._versions: object = None
        self._found: dict[int, frozenset[str]] = {}

    def for_level(self, level: int) -> frozenset[str]:
        """Return the names of the weights of which a level masks nothing."""
        versions = tensor_versions(tensor for _, tensor in self._entry.items())
        if self._versions != versions:
            self._versions, self._found = versions, {}
        if level not in self._found:
            parts = {name: self._cut(level, name, entry) for name, entry in self._entry.items()}
            used = {name: part for name, part in parts.items() if part is not None and part.numel()}
            # One tensor, because a GPU is waited for at each number that is read.
            highest = torch.stack([part.max() for part in used.values()]).tolist() if used else []
            above = {name for name, top in zip(used, highest, strict=True) if top > level}
            self._found[level] = frozenset(parts.keys() - above)
        return self._found[level]


class FlatEntry:
    """Entry levels of several weights in one tensor, so that a GPU makes all masks in one launch.

    Args:
        weights: the weights, or tensors of their shapes and memory layouts.
        entry: their entry levels, uint8 in the same shapes.
    """

    def __init__(self, weights: Sequence[Tensor], entry: Sequence[Tensor]) -> None:
        dense = [
            torch.empty_like(weight, dtype=torch.uint8).copy_(levels)
            for weight, levels in zip(weights, entry, strict=True)
        ]
        self._layouts = [(levels.size(), levels.stride()) for levels in dense]
        self._flat = torch.cat([levels.as_strided((levels.numel(),), (1,)) for levels in dense])

    def masks(self, level: int, dtype: torch.dtype) -> list[Tensor]:
        """Return a level's masks: 1 where it uses a weight, 0 elsewhere, in the layouts of the weights."""
        return self._split(torch.le(self._flat, level, out=torch.empty_like(self._flat, dtype=dtype)))

    def look_up(self, values: Tensor) -> list[Tensor]:
        """Return the value of each weight's entry level, in the layouts of the weights.

        Args:
            values: (n + 2,), by entry level.
        """
        return self._split(values.index_select(0, self._flat.int()))

    def _split(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([size.numel() for size, _ in self._layouts])
        return [p.as_strided(*layout) for p, layout in zip(pieces, self._layouts, strict=True)]


def tensor_versions(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """Return a value that changes when one of the tensors is replaced or written to."""
    return tuple((id(t), -1 if t.is_inference() else t._version) for t in tensors)
