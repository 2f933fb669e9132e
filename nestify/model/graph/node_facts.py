"""Facts about the nodes of a traced graph: shapes for any batch, modules, what depends on what."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from nestify.model.graph.operators import first, named_arguments, operator_name
from nestify.model.graph.trace import Traced

SymbolicShape = tuple[object, ...]
"""Sizes of a tensor: numbers, and expressions of the batch size."""

_SAME = frozenset(
    {"_to_copy", "alias", "clone", "contiguous", "detach", "expand", "lift_fresh_copy", "slice", "to"}
)
"""Operators that change no value where shape and type stay."""


def example_shape(node: fx.Node) -> SymbolicShape | None:
    """Sizes of what a node gives; None where it is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    sizes: tuple[Any, ...] = value.shape
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


def is_like(one: fx.Node, other: fx.Node) -> bool:
    """Whether both are tensors of one shape, for every batch size, and of one type."""
    shape = example_shape(one)
    if shape is None or shape != example_shape(other):
        return False
    return bool(one.meta["val"].dtype is other.meta["val"].dtype)


def changes_nothing(node: fx.Node) -> bool:
    """Whether a call returns the values of its first argument as they are, in evaluation."""
    name = operator_name(node.target)
    if name == "dropout":
        return named_arguments(node)["train"] is False
    source = node.args[0] if node.args else None
    return name in _SAME and isinstance(source, fx.Node) and is_like(node, source)


def ancestors(graph: fx.Graph) -> dict[fx.Node, int]:
    """What each node is computed from, as bits by position in the graph; sizes carry no data."""
    position = {node: place for place, node in enumerate(graph.nodes)}
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        found[node] = 0
        for source in _data(node):
            found[node] |= found[source] | 1 << position[source]
    return found


def constants(traced: Traced) -> set[fx.Node]:
    """The nodes that do not change with the images, but for the size of the batch."""
    found: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node is not traced.images and found.issuperset(_data(node)):
            found.add(node)
    return found


def _data(node: fx.Node) -> list[fx.Node]:
    """What a node is computed from, sizes aside."""
    return [s for s in node.all_input_nodes if not isinstance(s.meta.get("val"), torch.SymInt | int)]


def regions(graph: fx.Graph) -> dict[tuple[str, ...], set[fx.Node]]:
    """The nodes inside every module call, by `module_calls`; `()` is the whole model."""
    found: dict[tuple[str, ...], set[fx.Node]] = {(): set(graph.nodes)}
    for node in graph.nodes:
        calls = module_calls(node)
        for depth in range(1, len(calls) + 1):
            found.setdefault(calls[:depth], set()).add(node)
    return found


def module_calls(node: fx.Node) -> tuple[str, ...]:
    """Paths of the module calls around a node, outermost first; a second call of a module ends in `@1`."""
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    return tuple(
        path + "".join(key.partition("@")[1:])
        for key, (path, _) in stack.items()
        if path and not path.startswith("_empty_nn")
    )


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
            reshape = left.pop() if isinstance(last, _Reshape) else _Reshape(example_shape(first(node)) or ())
            if reshape != _Reshape(example_shape(node) or ()):
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
    order = list(range(len(example_shape(node) or ())))
    if "dims" in arguments:
        return tuple(order[dim] for dim in arguments["dims"])
    one, other = arguments["dim0"], arguments["dim1"]
    order[one], order[other] = order[other], order[one]
    return tuple(order)
