"""Calls of operators as rules receive them, the table of rules, and error messages that name a call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from nestify.errors import UnsupportedModelError
from nestify.model.graph.labels import Algebra, ChannelLabels, Shape
from nestify.model.graph.union_find import Nodes

Result = ChannelLabels | tuple[ChannelLabels, ...] | None
"""Labels of one tensor or several; None for an operator that returns no tensor."""


@dataclass
class Coupling(Algebra):
    """The algebra of labels, and further facts about channels that the rules of operators record.

    Attributes:
        channels: nodes that a weight multiplies; all other nodes are tokens, not channels.
        mixed: (nodes, operator) where dropping a channel changes the results of the rest (such as norms).
    """

    channels: list[Nodes] = field(default_factory=list)
    mixed: list[tuple[Nodes, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def mix(self, labels: ChannelLabels, dims: Sequence[int], operator: str) -> None:
        """Record that an operator combines all channels along these dimensions."""
        for dim in dims:
            if labels.is_live(dim):
                self.mixed.append((labels.nodes_of(dim), operator))


@dataclass(frozen=True)
class Call:
    """A call of an operator, with labels in place of tensors and numbers in place of symbolic sizes.

    Attributes:
        name: name of the operator, see `operator_name`.
        arguments: the arguments by name, without defaults.
        shapes: shape of each tensor that the call returns.
        used: per returned tensor, whether another node reads it.
    """

    name: str
    arguments: dict[str, Any]
    shapes: tuple[Shape, ...]
    used: tuple[bool, ...]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument, or the default if it is absent or None."""
        value = self.arguments.get(name)
        return default if value is None else value

    @property
    def shape(self) -> Shape:
        """Shape of the first tensor that the call returns."""
        return self.shapes[0]

    def tensors(self) -> list[ChannelLabels]:
        """Return the labels of every tensor among the arguments, including those in lists."""
        found: list[ChannelLabels] = []
        for value in self.arguments.values():
            values = value if isinstance(value, list | tuple) else [value]
            found += [item for item in values if isinstance(item, ChannelLabels)]
        return found


Rule = Callable[[Coupling, Call], Result]
RULES: dict[str, Rule] = {}
"""Maps the name of each operator to its rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


def operator_name(target: Any) -> str:
    """Return the name of an operator: `aten.conv2d.default` -> `conv2d`, `aten.relu_.default` -> `relu`."""
    if not isinstance(target, torch._ops.OpOverload):
        return str(getattr(target, "__name__", target))
    name = target._schema.name.removeprefix("aten::")
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def describe_call(node: fx.Node) -> str:
    """Return the operator and module of a call for messages, such as `conv2d in layer1.0.conv1`."""
    stack = node.meta.get("nn_module_stack") or {}
    module = list(stack.values())[-1][0] if stack else ""
    return f"{operator_name(node.target)} in {module.removeprefix('L__self__') or 'the model'}"


def refusal(node: fx.Node, problem: str, parts: str = "channels") -> UnsupportedModelError:
    """Make the error for a call that prevents parts of a model from being scheduled.

    Args:
        node: the call.
        problem: the rest of a sentence that starts with the operator and its module.
        parts: the parts that cannot be scheduled, such as channels.
    """
    return UnsupportedModelError(
        f"{describe_call(node)} {problem}, so this model's {parts} cannot be scheduled; "
        "--schedule weight works for every model"
    )


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Return a call's arguments by their names in the operator's schema, without defaults."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def first_argument(node: fx.Node) -> fx.Node:
    """Return the node that is a call's first argument."""
    argument = node.args[0]
    assert isinstance(argument, fx.Node)
    return argument


def plain_number(value: Any) -> Any:
    """Return a symbolic number's value in the example input; return any other value as it is."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.hint
    return value


def example_shape(tensor: torch.Tensor) -> Shape:
    """Return the shape that a tensor has with the example input."""
    return tuple(int(plain_number(size)) for size in tensor.shape)
