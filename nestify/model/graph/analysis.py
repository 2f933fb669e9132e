"""Label every tensor in a graph, and tie channels so that every level's tensors are boxes."""

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
    describe_call,
    example_shape,
    first_argument,
    named_arguments,
    operator_name,
    plain_number,
    refusal,
)
from nestify.model.graph.trace import Traced
from nestify.model.graph.union_find import FROZEN, Nodes, UnionFind

RULE_FILES = (rules_shape, rules_compute)
"""Modules that fill the table of rules when they are imported."""


@dataclass(frozen=True)
class Analysis:
    """The result of applying the rules to a graph.

    Attributes:
        traced: the graph.
        keep_outputs: whether the channels of the model's outputs are kept in full.
        coupling: the channels that are tied.
        labels: maps each node to the labels of its tensor, to a tuple of them if it returns several tensors,
            or to a number if it returns a size (its value in the example input).
        unknown: names of the operators without a rule, whose tensors are kept in full.
    """

    traced: Traced
    keep_outputs: bool = True
    coupling: Coupling = field(default_factory=Coupling)
    labels: dict[fx.Node, Any] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)


def analyse(traced: Traced, keep_outputs: bool = True) -> Analysis:
    """Find which channels are tied.

    Args:
        traced: the graph.
        keep_outputs: whether the channels of the model's outputs are kept in full.

    Raises:
        UnsupportedModelError: if the rule of an operator does not support one of its calls.
    """
    found = Analysis(traced, keep_outputs)
    for node in traced.graph.nodes:
        found.coupling.sets.reason = describe_call(node)
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
        for tensor in output_labels(found) if found.keep_outputs else ():
            found.coupling.freeze(tensor)
        return None
    if node.op != "call_function":
        raise refusal(node, f"is a {node.op} and not a call of an operator")
    if node.target is operator.getitem:
        return found.labels[first_argument(node)][node.args[1]]
    if not isinstance(node.target, torch._ops.OpOverload) or not _is_tensors(value):
        return plain_number(value)
    return _apply_rule(found, node, value)


def _is_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and isinstance(value[0], Tensor))


def _apply_rule(found: Analysis, node: fx.Node, value: Any) -> Any:
    several = isinstance(value, tuple | list)
    shapes = tuple(example_shape(tensor) for tensor in (value if several else [value]))
    arguments = fx.map_arg(named_arguments(node), lambda n: found.labels[n])
    arguments = {name: _plain_numbers(argument) for name, argument in arguments.items()}
    places = {user.args[1] for user in node.users if user.target is operator.getitem}
    used = tuple(not several or place in places for place in range(len(shapes)))
    call = Call(operator_name(node.target), arguments, shapes, used)
    rule = RULES.get(call.name)
    if rule is None:
        found.unknown.add(call.name)
        for labels in call.tensors():
            found.coupling.freeze(labels)
        full = tuple(ChannelLabels(shape) for shape in shapes)
        return full if several else full[0]
    try:
        result = rule(found.coupling, call)
    except (AssertionError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise refusal(node, "is called in a way that its rule does not support") from error
    expected = tuple(labels.shape for labels in _tensors([result]))
    if expected != shapes:
        raise refusal(node, f"returns shapes {list(shapes)}, but its rule expects {list(expected)}")
    return result


def _plain_numbers(value: Any) -> Any:
    return [plain_number(item) for item in value] if isinstance(value, list | tuple) else plain_number(value)


def all_labels(found: Analysis) -> list[ChannelLabels]:
    """Return the labels of every tensor in the graph."""
    return _tensors(list(found.labels.values()))


def output_labels(found: Analysis) -> list[ChannelLabels]:
    """Return the labels of the tensors that the model returns."""
    return _tensors([found.labels[node] for node in found.traced.outputs])


def _tensors(values: Any) -> list[ChannelLabels]:
    if isinstance(values, ChannelLabels):
        return [values]
    if isinstance(values, tuple | list):
        return [labels for value in values for labels in _tensors(value)]
    return []


def _make_boxes(found: Analysis) -> None:
    """Tie the remaining blocks over several dimensions, each so that it keeps the most independent units."""
    coupling = found.coupling
    coupling.sets.reason = "a reshape whose result must be a box"
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
    """Return the nodes as a matrix: (extent of the axis, everything else)."""
    return np.moveaxis(nodes, axis, 0).reshape(nodes.shape[axis], -1)


def _units(rows: Nodes) -> int:
    """Count the sets that would remain if the nodes of each row were tied."""
    roots, compact = np.unique(rows, return_inverse=True)
    compact = compact.reshape(rows.shape)
    trial = UnionFind()
    nodes = trial.fresh(len(roots))
    trial.freeze(nodes[roots == FROZEN])
    trial.union(nodes[compact[:, :1]], nodes[compact])
    return int(np.count_nonzero(np.unique(trial.roots(nodes))))


def _freeze_tokens(found: Analysis) -> None:
    """Freeze sets that no weight multiplies: register tokens, positions of a table that nothing adds to."""
    sets = found.coupling.sets
    is_channel = np.zeros(len(sets), dtype=bool)
    for nodes in found.coupling.channels:
        is_channel[sets.roots(nodes.ravel())] = True
    every = np.arange(len(sets))
    sets.freeze(every[~is_channel[sets.roots(every)]], "no weight multiplies it: a token, not a channel")
