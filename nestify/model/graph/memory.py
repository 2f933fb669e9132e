"""Find the nodes of a graph that may share memory, and replace in-place operators where possible."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from nestify.model.graph.operators import operator_name

_MAY_RETURN_ITS_ARGUMENT = frozenset({"alpha_dropout", "dropout", "feature_dropout", "getitem", "type_as"})
"""Operators that may return their first argument or a part of it, although their schemas do not say so."""


def is_write(node: fx.Node) -> bool:
    """Whether a call changes a tensor in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def find_owners(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Map each node to the node that allocated its memory, which views and in-place operators may share."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        found[node] = found[source] if isinstance(source, fx.Node) and _may_share(node) else node
    return found


def _may_share(node: fx.Node) -> bool:
    if operator_name(node.target) in _MAY_RETURN_ITS_ARGUMENT:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and any(
        result.alias_info is not None for result in node.target._schema.returns
    )


def make_functional(graph: fx.Graph) -> None:
    """Replace `relu_(x)` by `relu(x)` wherever later nodes read its result, as in a trace, and not x.

    The remaining writes are into memory that is read later through other nodes as well, such as an assignment
    to a slice.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in [node for node in order if is_write(node)]:
        target = _functional(node)
        if target is not None and not _is_read_elsewhere(node, order):
            node.target = target


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """Return `aten.relu.default` for `aten.relu_.default`; None if no such operator returns the same type."""
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._schema.name.removeprefix("aten::")
    if not name.endswith("_") or name.endswith("__") or name == "copy_":
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    found: torch._ops.OpOverload | None = getattr(packet, node.target._overloadname, None)
    if found is None or found._schema.is_mutable:
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    result = found(*args, **kwargs)
    return found if isinstance(result, Tensor) and result.dtype is node.meta["val"].dtype else None


def _is_read_elsewhere(write: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Whether the memory is read after the write through a node from before the write."""
    owner = find_owners(write.graph)
    return any(
        order[node] < order[write] and any(order[user] > order[write] for user in node.users)
        for node in order
        if owner[node] is owner[write]
    )
