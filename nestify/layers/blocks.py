"""Blocks of a network that can be skipped: what they are, what they cost, and how they form stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from nestify.channels.calls import first, operator_name
from nestify.channels.remains import needed_nodes
from nestify.channels.trace import Traced
from nestify.layers.facts import SymbolicShape, is_like, module_calls, shape_of
from nestify.layers.layout import cancel, is_layout
from nestify.layers.macs import NodeMacs
from nestify.layers.residual import Region, Residuals

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
        block = Block(name, (shape_of(output) or ())[1:], parameters, cost, name in modules)
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
