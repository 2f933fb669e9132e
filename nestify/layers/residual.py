"""Residual additions, `trunk + branch`, and what a trunk carries."""

from collections.abc import Collection, Iterator

from torch import fx

from nestify.channels.calls import named_arguments, operator_name
from nestify.channels.memory import is_write
from nestify.channels.trace import Traced
from nestify.layers.facts import ancestors, changes_nothing, constants, is_like, module_calls, regions
from nestify.layers.layout import is_layout

Region = Collection[fx.Node]
"""The nodes inside a module call."""


class Residuals:
    """The residual additions of a graph.

    `add(a, b)` is one with trunk a if a, b and the sum have one shape and type, nothing but the sum reads b,
    and b is computed from a, or from what a carries (see `walk_back`) inside the module that adds. If that
    holds both ways, none is the trunk.

    Attributes:
        trunks: each addition with its trunk, in order of execution.
        regions: the nodes inside every module call, by the calls around them.
        constants: nodes that do not change with the images.
    """

    def __init__(self, traced: Traced) -> None:
        self.trunks: dict[fx.Node, fx.Node] = {}
        self.regions = regions(traced.graph)
        self.constants = constants(traced)
        bits = ancestors(traced.graph)
        position = {node: place for place, node in enumerate(traced.graph.nodes)}
        for node in traced.graph.nodes:
            if operator_name(node.target) != "add" or is_write(node) or node in self.constants:
                continue
            region = self.regions[module_calls(node)]
            found = [
                trunk
                for trunk, branch in _ways(node)
                if any(bits[branch] >> position[source] & 1 for source in self.walk_back(trunk, region))
            ]
            if len(found) == 1:
                self.trunks[node] = found[0]

    def walk_back(self, node: fx.Node, region: Region) -> Iterator[fx.Node]:
        """A node, and those that it comes from by `carried` and residual additions, to the first outside."""
        yield node
        while node in region:
            source = self.trunks[node] if node in self.trunks else self.carried(node)
            if source is None:
                return
            yield source
            node = source

    def carried(self, node: fx.Node) -> fx.Node | None:
        """The node that this one only rearranges, repeats, or scales by a constant; None for all others."""
        if operator_name(node.target) in ("mul", "div") and not is_write(node):
            return self._scaled(node)
        source = node.args[0] if changes_nothing(node) or is_layout(node) else None
        return source if isinstance(source, fx.Node) else None

    def _scaled(self, node: fx.Node) -> fx.Node | None:
        one, other = node.args[:2]
        ways = [(one, other), (other, one)] if operator_name(node.target) == "mul" else [(one, other)]
        for source, factor in ways:
            constant = factor in self.constants if isinstance(factor, fx.Node) else True
            if constant and isinstance(source, fx.Node) and is_like(node, source):
                return source
        return None


def _ways(add: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(trunk, branch) as far as an addition alone can tell."""
    arguments = named_arguments(add)
    a, b = arguments["self"], arguments["other"]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return
    for trunk, branch in ((a, b), (b, a)):
        scaled = trunk is b and arguments.get("alpha", 1) != 1
        if is_like(add, trunk) and is_like(add, branch) and set(branch.users) == {add} and not scaled:
            yield trunk, branch
