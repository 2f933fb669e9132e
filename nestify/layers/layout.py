"""Changes of layout: operators that rearrange the elements of a tensor, and when they cancel each other."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import fx

from nestify.channels.calls import first, named_arguments, operator_name
from nestify.layers.facts import SymbolicShape, shape_of

_RESHAPES = frozenset(
    {"_unsafe_view", "flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view", "view_as"}
)
"""Operators that keep the order of the elements."""
_PERMUTATIONS = frozenset({"permute", "transpose"})


class _Reshape(NamedTuple):
    before: SymbolicShape


class _Permutation(NamedTuple):
    order: tuple[int, ...]


def is_layout(node: fx.Node) -> bool:
    """Whether a call only rearranges its first argument."""
    return operator_name(node.target) in _RESHAPES | _PERMUTATIONS


def cancel(changes: Iterable[fx.Node]) -> bool:
    """Whether changes of layout in sequence leave every element in its place.

    Reshapes that follow each other are one reshape, permutations one permutation. One that changes nothing
    is dropped, so that those around it follow each other.
    """
    left: list[_Reshape | _Permutation] = []
    for node in changes:
        last = left[-1] if left else None
        if operator_name(node.target) in _RESHAPES:
            reshape = left.pop() if isinstance(last, _Reshape) else _Reshape(shape_of(first(node)) or ())
            if reshape != _Reshape(shape_of(node) or ()):
                left.append(reshape)
        else:
            order = _order(node)
            if isinstance(last, _Permutation):
                left.pop()
                order = tuple(last.order[dim] for dim in order)
            if order != tuple(range(len(order))):
                left.append(_Permutation(order))
    return not left


def _order(node: fx.Node) -> tuple[int, ...]:
    """The dimension of its argument that each dimension of a permutation's result is."""
    arguments = named_arguments(node)
    order = list(range(len(shape_of(node) or ())))
    if "dims" in arguments:
        return tuple(order[dim] for dim in arguments["dims"])
    one, other = arguments["dim0"], arguments["dim1"]
    order[one], order[other] = order[other], order[one]
    return tuple(order)
