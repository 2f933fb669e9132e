"""Find what remains of a graph when some of its nodes are replaced by earlier ones."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from nestify.model.graph.memory import find_owners, is_write
from nestify.model.graph.operators import refusal


@dataclass(frozen=True)
class PrunedGraph:
    """The part of a graph that is needed when some of its nodes are replaced.

    Attributes:
        replacements: maps each replaced node to the earlier one that is read in its place.
        needed: nodes that the output depends on, and the output itself.
        written: nodes whose memory a needed node writes into.
    """

    replacements: Mapping[fx.Node, fx.Node]
    needed: frozenset[fx.Node]
    written: frozenset[fx.Node]


def prune_graph(graph: fx.Graph, replacements: Mapping[str, str]) -> PrunedGraph:
    """Replace nodes by earlier ones, and find the nodes that are then needed; the graph stays as it is.

    Args:
        graph: the graph of the full network.
        replacements: name of a node -> name of an earlier one of the same shape and type, which may be
            replaced itself.

    Raises:
        UnsupportedModelError: if a needed node writes in place into a replaced node or a replacement.
    """
    nodes = {node.name: node for node in graph.nodes}
    source_of: dict[fx.Node, fx.Node] = {}
    for name, node in nodes.items():
        if name in replacements:
            source = nodes[replacements[name]]
            source_of[node] = source_of.get(source, source)
    assert len(source_of) == len(replacements)
    needed = needed_nodes(graph, source_of)
    writes = [node for node in graph.nodes if node in needed and is_write(node)]
    if not writes:
        return PrunedGraph(source_of, needed, frozenset())
    owner = find_owners(graph)
    ends = {owner[node] for pair in source_of.items() for node in pair}
    for node in writes:
        if owner[node] in ends:
            raise refusal(node, "writes in place into the input or output of a skipped block", "blocks")
    memory = {owner[node] for node in writes}
    return PrunedGraph(source_of, needed, frozenset(node for node in owner if owner[node] in memory))


def needed_nodes(graph: fx.Graph, replacements: Mapping[fx.Node, fx.Node]) -> frozenset[fx.Node]:
    """Find the nodes that the output depends on, including writes into their memory.

    Args:
        graph: the graph of the full network.
        replacements: maps each replaced node to the earlier one that is read in its place.
    """
    found: set[fx.Node] = set()
    due = [graph.output_node()]
    writes = [node for node in graph.nodes if is_write(node)]
    owner = find_owners(graph) if writes else {}
    while due:
        _add_sources(due, replacements, found)
        seen = [*found, *(node for node, source in replacements.items() if source in found)]
        memory = {owner[node] for node in seen} if writes else set()
        due = [node for node in writes if node not in found and owner[node] in memory]
    return frozenset(found)


def _add_sources(due: list[fx.Node], replacements: Mapping[fx.Node, fx.Node], found: set[fx.Node]) -> None:
    """Move nodes from `due` to `found`, with all nodes that they are computed from."""
    while due:
        node = due.pop()
        node = replacements.get(node, node)
        if node not in found:
            found.add(node)
            due.extend(node.all_input_nodes)
