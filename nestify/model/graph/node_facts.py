"""Facts about the nodes of a traced graph: shapes for any batch size, modules, and dependencies."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from nestify.model.graph.operators import first_argument, named_arguments, operator_name
from nestify.model.graph.trace import Traced

SymbolicShape = tuple[object, ...]
"""Sizes of a tensor: numbers, or expressions in the batch size."""

_SAME = frozenset(
    {"_to_copy", "alias", "clone", "contiguous", "detach", "expand", "lift_fresh_copy", "slice", "to"}
)
"""Operators that keep all values if the shape and type stay the same."""


def symbolic_shape(node: fx.Node) -> SymbolicShape | None:
    """Return the sizes of a node's result; None if it is not a tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    sizes: tuple[Any, ...] = value.shape
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


def is_like(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes are tensors of the same type, and of the same shape for every batch size."""
    shape = symbolic_shape(one)
    if shape is None or shape != symbolic_shape(other):
        return False
    return bool(one.meta["val"].dtype is other.meta["val"].dtype)


def is_identity(node: fx.Node) -> bool:
    """Whether a call returns the values of its first argument unchanged in evaluation mode."""
    name = operator_name(node.target)
    if name == "dropout":
        return named_arguments(node)["train"] is False
    source = node.args[0] if node.args else None
    return name in _SAME and isinstance(source, fx.Node) and is_like(node, source)


def find_ancestors(graph: fx.Graph) -> dict[fx.Node, int]:
    """Find the nodes that each node is computed from, except sizes, as a bit set of graph positions."""
    position = {node: place for place, node in enumerate(graph.nodes)}
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        found[node] = 0
        for source in _data(node):
            found[node] |= found[source] | 1 << position[source]
    return found


def find_constants(traced: Traced) -> set[fx.Node]:
    """Find the nodes whose values do not depend on the images, except on the batch size."""
    found: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node is not traced.images and found.issuperset(_data(node)):
            found.add(node)
    return found


def _data(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that a node is computed from, except sizes."""
    return [s for s in node.all_input_nodes if not isinstance(s.meta.get("val"), torch.SymInt | int)]


def find_regions(graph: fx.Graph) -> dict[tuple[str, ...], set[fx.Node]]:
    """Find the nodes inside every module call, by `module_calls`; `()` is the complete model."""
    found: dict[tuple[str, ...], set[fx.Node]] = {(): set(graph.nodes)}
    for node in graph.nodes:
        calls = module_calls(node)
        for depth in range(1, len(calls) + 1):
            found.setdefault(calls[:depth], set()).add(node)
    return found


def module_calls(node: fx.Node) -> tuple[str, ...]:
    """Return the paths of the module calls around a node, outermost first; a second call ends in `@1`."""
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
    """Whether a call only reshapes or permutes its first argument."""
    return operator_name(node.target) in _RESHAPES | _PERMUTATIONS


def layouts_cancel(changes: Iterable[fx.Node]) -> bool:
    """Whether a sequence of reshapes and permutations leaves every element in its place.

    Consecutive reshapes are merged into one, and so are consecutive permutations. One that then changes
    nothing is dropped, so that its neighbours become consecutive.
    """
    left: list[_Reshape | _Permutation] = []
    for node in changes:
        last = left[-1] if left else None
        if operator_name(node.target) in _RESHAPES:
            reshape = (
                left.pop()
                if isinstance(last, _Reshape)
                else _Reshape(symbolic_shape(first_argument(node)) or ())
            )
            if reshape != _Reshape(symbolic_shape(node) or ()):
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
    """Return, for each dimension of a permutation's result, the dimension of its argument that it is."""
    arguments = named_arguments(node)
    order = list(range(len(symbolic_shape(node) or ())))
    if "dims" in arguments:
        return tuple(order[dim] for dim in arguments["dims"])
    one, other = arguments["dim0"], arguments["dim1"]
    order[one], order[other] = order[other], order[one]
    return tuple(order)
