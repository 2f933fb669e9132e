"""Blocks of a network that can be skipped: what they are, what they cost, and how they form stages."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from nestify.model.graph.macs import NodeMacs
from nestify.model.graph.memory import is_write
from nestify.model.graph.node_facts import (
    SymbolicShape,
    ancestors,
    cancel,
    changes_nothing,
    constants,
    example_shape,
    is_layout,
    is_like,
    module_calls,
    regions,
)
from nestify.model.graph.operators import first, named_arguments, operator_name
from nestify.model.graph.skipping import needed_nodes
from nestify.model.graph.trace import Traced

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


Calls = tuple[str, ...]
Span = tuple[fx.Node, fx.Node]
"""The node that a block gives, and the one that stands for it where the block is skipped."""

_ACTIVATIONS = frozenset(
    {"elu", "gelu", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "relu6", "silu"}
)


@dataclass(frozen=True)
class Block:
    """A part of a network that its input can stand for.

    Attributes:
        name: path of the module, such as `layer1.0`; `blocks.1#2` for the branch of the second residual
            addition in the module `blocks.1`. A second call of a module is `blocks.1@1`.
        shape: of its input and its output, without the batch.
        parameters: state-dict names of the parameters and buffers that nothing but the block reads.
        macs: multiply-accumulates per image of what nothing but the block needs.
        whole: whether it is a module; otherwise it is one residual branch.
    """

    name: str
    shape: SymbolicShape
    parameters: tuple[str, ...]
    macs: int
    whole: bool


@dataclass(frozen=True)
class Stage:
    """Blocks of one kind that work on one shape, in order of execution."""

    shape: SymbolicShape
    blocks: tuple[Block, ...]


def find_blocks(traced: Traced, counted: NodeMacs) -> dict[Block, Span]:
    """Find the blocks of a network in order of execution; none is inside another, and each does work.

    Args:
        traced: the network.
        counted: MACs of its nodes. A node of an unknown operator is taken to do work.

    A block is a module that is the identity once its residual branches are gone. Of the modules around a
    residual addition the largest such one is taken, as long as it is no sequence of blocks: no addition on
    the way from its input to its output is in an element of a sequence (a module whose name is a number)
    inside it. A residual addition in no such module is a block by its branch alone.
    """
    modules, branches = _find_spans(Residuals(traced))
    position = {node: place for place, node in enumerate(traced.graph.nodes)}
    spans = sorted((modules | branches).items(), key=lambda item: position[item[1][0]])
    every = needed_nodes(traced.graph, {})
    gone = {name: every - needed_nodes(traced.graph, dict([span])) for name, span in spans}
    found = {}
    for name, (output, source) in spans:
        inside = any(output in gone[other] for other in gone if other != name)
        if inside or not gone[name] & (counted.macs.keys() | counted.unknown):
            continue
        parameters = tuple(
            key for node, key in traced.names.items() if node in gone[name] and key not in traced.constants
        )
        cost = sum(counted.macs.get(node, 0) for node in gone[name])
        block = Block(name, (example_shape(output) or ())[1:], parameters, cost, name in modules)
        found[block] = output, source
    return found


def find_stages(blocks: Sequence[Block]) -> tuple[Stage, ...]:
    """Blocks of one shape and kind together, in order of first execution.

    Modules are of one kind. Branches are where they are the same addition of their modules, so that attention
    and MLP branches that take turns are two stages.
    """
    found: dict[tuple[SymbolicShape, str], list[Block]] = {}
    for block in blocks:
        kind = "" if block.whole else block.name.rpartition("#")[2]
        found.setdefault((block.shape, kind), []).append(block)
    return tuple(Stage(shape, tuple(members)) for (shape, _), members in found.items())


def _find_spans(residuals: Residuals) -> tuple[dict[str, Span], dict[str, Span]]:
    """Modules, and branches in no such module, by name."""
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
    """What a module gives and reads, if it is the identity without its residual branches.

    An activation after the last addition, and constant scales of the trunk, go with the block.
    """
    region = residuals.regions[calls]
    outputs = [node for node in region - residuals.constants if _leaves(node, region)]
    if len(outputs) != 1:
        return None
    path = list(residuals.walk_back(outputs[0], region))
    last = path[-1]
    if last in region and operator_name(last.target) in _ACTIVATIONS and not residuals.trunks.keys() & path:
        path += residuals.walk_back(first(last), region)
    *way, source = path
    additions = [node for node in way if node in residuals.trunks]
    if source in region or not is_like(outputs[0], source):
        return None
    if any(_is_element(name) for node in additions for name in module_calls(node)[len(calls) :]):
        return None
    return (outputs[0], source) if cancel(filter(is_layout, reversed(way))) else None


def _leaves(node: fx.Node, region: Region) -> bool:
    """Whether something outside reads a tensor that a node gives."""
    is_tensor = isinstance(node.meta.get("val"), Tensor | tuple | list)
    return is_tensor and any(user not in region for user in node.users)


def _is_element(path: str) -> bool:
    return path.rpartition(".")[2].partition("@")[0].isdigit()


def _branch_name(add: fx.Node, trunks: Mapping[fx.Node, fx.Node]) -> str:
    """The module that adds, and the how manieth of its residual additions this is: `blocks.1#2`."""
    calls = module_calls(add)
    own = [node for node in trunks if module_calls(node) == calls]
    return f"{calls[-1] if calls else ''}#{own.index(add) + 1}"
