"""What is left of a graph when some of its nodes stand for others."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from nestify.model.graph.memory import is_write, owners
from nestify.model.graph.operators import refusal


@dataclass(frozen=True)
class Remains:
    """What a network still computes.

    Attributes:
        stand_ins: each node that is replaced, and the earlier one that its readers read instead.
        needed: nodes that the output depends on, itself among them.
        written: nodes in memory that a needed node writes into.
    """

    stand_ins: Mapping[fx.Node, fx.Node]
    needed: frozenset[fx.Node]
    written: frozenset[fx.Node]


def remains_of(graph: fx.Graph, substitutes: Mapping[str, str]) -> Remains:
    """Let nodes stand for others.

    Args:
        substitutes: name of a node -> name of an earlier one of the same shape and type, which may be
            replaced itself.

    Raises:
        UnsupportedModelError: if a needed node writes in place into what is replaced or stands in.
    """
    nodes = {node.name: node for node in graph.nodes}
    stand_ins: dict[fx.Node, fx.Node] = {}
    for name, node in nodes.items():
        if name in substitutes:
            source = nodes[substitutes[name]]
            stand_ins[node] = stand_ins.get(source, source)
    assert len(stand_ins) == len(substitutes)
    needed = needed_nodes(graph, stand_ins)
    writes = [node for node in graph.nodes if node in needed and is_write(node)]
    if not writes:
        return Remains(stand_ins, needed, frozenset())
    owner = owners(graph)
    ends = {owner[node] for pair in stand_ins.items() for node in pair}
    for node in writes:
        if owner[node] in ends:
            raise refusal(node, "writes in place into what a skipped block reads or gives", "blocks")
    memory = {owner[node] for node in writes}
    return Remains(stand_ins, needed, frozenset(node for node in owner if owner[node] in memory))


def needed_nodes(graph: fx.Graph, stand_ins: Mapping[fx.Node, fx.Node]) -> frozenset[fx.Node]:
    """The nodes that the output depends on, writes into their memory among them.

    Args:
        stand_ins: as in `Remains`.
    """
    found: set[fx.Node] = set()
    due = [graph.output_node()]
    writes = [node for node in graph.nodes if is_write(node)]
    owner = owners(graph) if writes else {}
    while due:
        _add(due, stand_ins, found)
        seen = [*found, *(node for node, source in stand_ins.items() if source in found)]
        memory = {owner[node] for node in seen} if writes else set()
        due = [node for node in writes if node not in found and owner[node] in memory]
    return frozenset(found)


def _add(due: list[fx.Node], stand_ins: Mapping[fx.Node, fx.Node], found: set[fx.Node]) -> None:
    """Add nodes and all that they are computed from."""
    while due:
        node = due.pop()
        node = stand_ins.get(node, node)
        if node not in found:
            found.add(node)
            due.extend(node.all_input_nodes)
