"""Which nodes of a graph may share memory, and which of them write into it."""

import torch
from torch import fx

from nestify.channels.calls import operator_name

_MAY_RETURN_ITS_ARGUMENT = frozenset({"alpha_dropout", "dropout", "feature_dropout", "getitem", "type_as"})
"""Operators whose schemas do not say that the result may be the first argument, or a part of it."""


def is_write(node: fx.Node) -> bool:
    """Whether a call changes a tensor in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def owners(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The node that made the memory of each node, as far as views and in-place operators may share it."""
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
