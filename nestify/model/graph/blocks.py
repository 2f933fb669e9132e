"""Find the blocks of a network that can be skipped, their costs, and the stages that they form."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from nestify.model.graph.macs import NodeMacs
from nestify.model.graph.memory import is_write
from nestify.model.graph.node_facts import (
    SymbolicShape,
    find_ancestors,
    find_constants,
    find_regions,
    is_identity,
    is_layout,
    is_like,
    layouts_cancel,
    module_calls,
    symbolic_shape,
)
from nestify.model.graph.operators import first_argument, named_arguments, operator_name
from nestify.model.graph.skipping import needed_nodes
from nestify.model.graph.trace import Traced

Region = Collection[fx.Node]
"""The nodes inside a module call."""


class Residuals:
    """The residual additions of a graph.

    `add(a, b)` is one with trunk a if a, b and the sum have the same shape and type, only the sum reads b,
    and b is computed from a or from a node that `walk_back` reaches from a inside the module that adds. If
    this holds both ways, neither is the trunk, and the addition is not residual.

    Attributes:
        trunks: maps each addition to its trunk, in order of execution.
        regions: maps each path of module calls, outermost first, to the nodes inside.
        constants: nodes that do not depend on the images.
    """

    def __init__(self, traced: Traced) -> None:
        self.trunks: dict[fx.Node, fx.Node] = {}
        self.regions = find_regions(traced.graph)
        self.constants = find_constants(traced)
        bits = find_ancestors(traced.graph)
        position = {node: place for place, node in enumerate(traced.graph.nodes)}
        for node in traced.graph.nodes:
            if operator_name(node.target) != "add" or is_write(node) or node in self.constants:
                continue
            region = self.regions[module_calls(node)]
            found = [
                trunk
                for trunk, branch in _trunk_candidates(node)
                if any(bits[branch] >> position[source] & 1 for source in self.walk_back(trunk, region))
            ]
            if len(found) == 1:
                self.trunks[node] = found[0]

    def walk_back(self, node: fx.Node, region: Region) -> Iterator[fx.Node]:
        """Yield a node and its sources along trunks and `carried_source`, to the first outside the region."""
        yield node
        while node in region:
            source = self.trunks[node] if node in self.trunks else self.carried_source(node)
            if source is None:
                return
            yield source
            node = source

    def carried_source(self, node: fx.Node) -> fx.Node | None:
        """Return the node that this one only rearranges, repeats, or scales by a constant; otherwise None."""
        if operator_name(node.target) in ("mul", "div") and not is_write(node):
            return self._scaled_source(node)
        source = node.args[0] if is_identity(node) or is_layout(node) else None
        return source if isinstance(source, fx.Node) else None

    def _scaled_source(self, node: fx.Node) -> fx.Node | None:
        one, other = node.args[:2]
        pairs = [(one, other), (other, one)] if operator_name(node.target) == "mul" else [(one, other)]
        for source, factor in pairs:
            constant = factor in self.constants if isinstance(factor, fx.Node) else True
            if constant and isinstance(source, fx.Node) and is_like(node, source):
                return source
        return None


def _trunk_candidates(add: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the (trunk, branch) pairs that are possible, before the sources of the operands are compared."""
    arguments = named_arguments(add)
    a, b = arguments["self"], arguments["other"]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return
    for trunk, branch in ((a, b), (b, a)):
        scaled = trunk is b and arguments.get("alpha", 1) != 1
        if is_like(add, trunk) and is_like(add, branch) and set(branch.users) == {add} and not scaled:
            yield trunk, branch


Calls = tuple[str, ...]
"""Paths of nested module calls, outermost first."""
Span = tuple[fx.Node, fx.Node]
"""A block's output node, and the node that is read in its place if the block is skipped."""

_ACTIVATIONS = frozenset(
    {"elu", "gelu", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "relu6", "silu"}
)


@dataclass(frozen=True)
class Block:
    """A part of a network that can be replaced by its input.

    Attributes:
        name: path of the module, such as `layer1.0`; `blocks.1#2` for the branch of the second residual
            addition in the module `blocks.1`. A second call of a module is `blocks.1@1`.
        shape: shape of its input and its output, without the batch.
        parameters: state-dict names of the parameters and buffers that only the block reads.
        macs: multiply-accumulates per image of the operators that only the block needs.
        is_module: True for a module, False for a single residual branch.
    """

    name: str
    shape: SymbolicShape
    parameters: tuple[str, ...]
    macs: int
    is_module: bool


@dataclass(frozen=True)
class Stage:
    """Blocks of one kind that work on one shape.

    Attributes:
        shape: shape of their inputs and outputs, without the batch.
        blocks: the blocks in order of execution.
    """

    shape: SymbolicShape
    blocks: tuple[Block, ...]


def find_blocks(traced: Traced, counted: NodeMacs) -> dict[Block, Span]:
    """Find the blocks of a network in order of execution; none is inside another, and each has MACs.

    A block is a module that is the identity without its residual branches. Of the modules around a residual
    addition, the largest such module that is not a sequence of blocks is the block. A module is a sequence of
    blocks if an addition between its input and its output is in an element of a sequence (a module whose name
    is a number) inside it. If a residual addition is in no such module, its branch alone is a block.

    Args:
        traced: the network.
        counted: MACs of its nodes. A node of an unknown operator is assumed to have MACs.

    Returns:
        A mapping from each block to its span.
    """
    modules, branches = _find_spans(Residuals(traced))
    position = {node: place for place, node in enumerate(traced.graph.nodes)}
    spans = sorted((modules | branches).items(), key=lambda item: position[item[1][0]])
    needed = needed_nodes(traced.graph, {})
    unneeded = {name: needed - needed_nodes(traced.graph, dict([span])) for name, span in spans}
    found = {}
    for name, (output, source) in spans:
        inside = any(output in unneeded[other] for other in unneeded if other != name)
        if inside or not unneeded[name] & (counted.macs.keys() | counted.unknown):
            continue
        parameters = tuple(
            key
            for node, key in traced.names.items()
            if node in unneeded[name] and key not in traced.constants
        )
        cost = sum(counted.macs.get(node, 0) for node in unneeded[name])
        block = Block(name, (symbolic_shape(output) or ())[1:], parameters, cost, name in modules)
        found[block] = output, source
    return found


def find_stages(blocks: Sequence[Block]) -> tuple[Stage, ...]:
    """Group blocks by shape and kind, in order of first execution.

    All modules are of one kind. Branches are of one kind if they have the same number in their modules, so
    that alternating attention and MLP branches form two stages.
    """
    found: dict[tuple[SymbolicShape, str], list[Block]] = {}
    for block in blocks:
        kind = "" if block.is_module else block.name.rpartition("#")[2]
        found.setdefault((block.shape, kind), []).append(block)
    return tuple(Stage(shape, tuple(members)) for (shape, _), members in found.items())


def _find_spans(residuals: Residuals) -> tuple[dict[str, Span], dict[str, Span]]:
    """Find the modules that are blocks, and the branches outside of such modules, by name."""
    modules: dict[str, Span] = {}
    branches: dict[str, Span] = {}
    for add, trunk in residuals.trunks.items():
        calls = module_calls(add)
        for depth in range(1, len(calls) + 1):
            span = _span(calls[:depth], residuals)
            if span is not None:
                modules[calls[depth - 1]] = span
                break
        else:
            branches[_branch_name(add, residuals.trunks)] = add, trunk
    return modules, branches


def _span(calls: Calls, residuals: Residuals) -> Span | None:
    """Return the span of a module that is the identity without its residual branches; None for other modules.

    An activation after the last addition and constant scales of the trunk are skipped with the block.
    """
    region = residuals.regions[calls]
    outputs = [node for node in region - residuals.constants if _is_read_outside(node, region)]
    if len(outputs) != 1:
        return None
    path = list(residuals.walk_back(outputs[0], region))
    last = path[-1]
    if last in region and operator_name(last.target) in _ACTIVATIONS and not residuals.trunks.keys() & path:
        path += residuals.walk_back(first_argument(last), region)
    *inner, source = path
    additions = [node for node in inner if node in residuals.trunks]
    if source in region or not is_like(outputs[0], source):
        return None
    if any(_is_element(name) for node in additions for name in module_calls(node)[len(calls) :]):
        return None
    return (outputs[0], source) if layouts_cancel(filter(is_layout, reversed(inner))) else None


def _is_read_outside(node: fx.Node, region: Region) -> bool:
    """Whether a node's result is a tensor that a node outside the region reads."""
    is_tensor = isinstance(node.meta.get("val"), Tensor | tuple | list)
    return is_tensor and any(user not in region for user in node.users)


def _is_element(path: str) -> bool:
    return path.rpartition(".")[2].partition("@")[0].isdigit()


def _branch_name(add: fx.Node, trunks: Mapping[fx.Node, fx.Node]) -> str:
    """Return the name of a residual branch: its module, and its number there from 1, such as `blocks.1#2`."""
    calls = module_calls(add)
    own = [node for node in trunks if module_calls(node) == calls]
    return f"{calls[-1] if calls else ''}#{own.index(add) + 1}"
