"""Labels of every tensor in a graph, and what must be tied so that every level's tensors are boxes."""

import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from nestify.model.graph import rules_compute, rules_shape
from nestify.model.graph.labels import ChannelLabels, NodeBlock
from nestify.model.graph.operators import (
    RULES,
    Call,
    Coupling,
    example_shape,
    first,
    hinted,
    named_arguments,
    operator_name,
    place_of,
    refusal,
)
from nestify.model.graph.trace import Traced
from nestify.model.graph.union_find import WHOLE, Nodes, UnionFind

RULE_FILES = (rules_shape, rules_compute)
"""Importing them fills the table of rules."""


@dataclass(frozen=True)
class Analysis:
    """What the rules found.

    Attributes:
        coupling: which channels are tied.
        labels: of every node that gives a tensor; a tuple for a node that gives several, a number for one
            that gives a size of the example.
        unknown: operators without a rule, whose tensors are kept whole.
    """

    traced: Traced
    coupling: Coupling = field(default_factory=Coupling)
    labels: dict[fx.Node, Any] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)


def analyse(traced: Traced) -> Analysis:
    """Find which channels are tied.

    Raises:
        UnsupportedModelError: for a call that its rule does not understand.
    """
    found = Analysis(traced)
    for node in traced.graph.nodes:
        found.coupling.sets.reason = place_of(node)
        found.labels[node] = _labels(found, node)
    _make_boxes(found)
    _freeze_tokens(found)
    return found


def _labels(found: Analysis, node: fx.Node) -> Any:
    value: Any = node.meta.get("val")
    if node.op == "placeholder":
        shape = example_shape(value)
        return ChannelLabels(shape) if node is found.traced.images else found.coupling.fresh(shape)
    if node.op == "output":
        found.coupling.sets.reason = "the model's output"
        for tensor in _tensors(fx.map_arg(node.args, lambda n: found.labels[n])):
            found.coupling.freeze(tensor)
        return None
    if node.op != "call_function":
        raise refusal(node, f"is a {node.op} and not a call of an operator")
    if node.target is operator.getitem:
        return found.labels[first(node)][node.args[1]]
    if not isinstance(node.target, torch._ops.OpOverload) or not _gives_tensors(value):
        return hinted(value)
    return _apply_rule(found, node, value)


def _gives_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and isinstance(value[0], Tensor))


def _apply_rule(found: Analysis, node: fx.Node, value: Any) -> Any:
    several = isinstance(value, tuple | list)
    shapes = tuple(example_shape(tensor) for tensor in (value if several else [value]))
    arguments = fx.map_arg(named_arguments(node), lambda n: found.labels[n])
    arguments = {name: _plain(argument) for name, argument in arguments.items()}
    places = {user.args[1] for user in node.users if user.target is operator.getitem}
    used = tuple(not several or place in places for place in range(len(shapes)))
    call = Call(operator_name(node.target), arguments, shapes, used)
    known = RULES.get(call.name)
    if known is None:
        found.unknown.add(call.name)
        for labels in call.tensors():
            found.coupling.freeze(labels)
        whole = tuple(ChannelLabels(shape) for shape in shapes)
        return whole if several else whole[0]
    try:
        result = known(found.coupling, call)
    except (AssertionError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise refusal(node, "is called in a way that its rule does not know") from error
    promised = tuple(labels.shape for labels in _tensors([result]))
    if promised != shapes:
        raise refusal(node, f"gives {list(shapes)}, but its rule expects {list(promised)}")
    return result


def _plain(value: Any) -> Any:
    return [hinted(item) for item in value] if isinstance(value, list | tuple) else hinted(value)


def all_labels(found: Analysis) -> list[ChannelLabels]:
    """Of every tensor in the graph."""
    return _tensors(list(found.labels.values()))


def _tensors(values: Any) -> list[ChannelLabels]:
    if isinstance(values, ChannelLabels):
        return [values]
    if isinstance(values, tuple | list):
        return [labels for value in values for labels in _tensors(value)]
    return []


def _make_boxes(found: Analysis) -> None:
    """Tie what is left of blocks over several dimensions to the dimension that leaves most units."""
    coupling = found.coupling
    coupling.sets.reason = "a reshape that must stay a box"
    blocks = [block for labels in all_labels(found) for block in labels.blocks]
    joint = {id(block.nodes): block for block in blocks if len(block.dims) > 1}
    while joint:
        for key, block in list(joint.items()):
            simple = coupling.simple_block(block)
            if simple is None or len(simple.dims) == 1:
                del joint[key]
            else:
                _tie(coupling, simple)


def _tie(coupling: Coupling, block: NodeBlock) -> None:
    roots = coupling.sets.roots(block.nodes)
    axis = max(range(roots.ndim), key=lambda k: _units(_rows(roots, k)))
    rows = _rows(block.nodes, axis)
    coupling.sets.union(rows[:, :1], rows)


def _rows(nodes: Nodes, axis: int) -> Nodes:
    """(extent of the axis, everything else)"""
    return np.moveaxis(nodes, axis, 0).reshape(nodes.shape[axis], -1)


def _units(rows: Nodes) -> int:
    """Sets that would be left if every row were one."""
    roots, compact = np.unique(rows, return_inverse=True)
    compact = compact.reshape(rows.shape)
    trial = UnionFind()
    nodes = trial.fresh(len(roots))
    trial.freeze(nodes[roots == WHOLE])
    trial.union(nodes[compact[:, :1]], nodes[compact])
    return int(np.count_nonzero(np.unique(trial.roots(nodes))))


def _freeze_tokens(found: Analysis) -> None:
    """Keep whole what no weight multiplies: register tokens, positions of a table that nothing adds to."""
    sets = found.coupling.sets
    is_channel = np.zeros(len(sets), dtype=bool)
    for nodes in found.coupling.channels:
        is_channel[sets.roots(nodes.ravel())] = True
    every = np.arange(len(sets))
    sets.freeze(every[~is_channel[sets.roots(every)]], "no weight multiplies it: a token, not a channel")
