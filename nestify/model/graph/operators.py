"""One call of an operator as its rule sees it, the table of rules, and how a refusal names a call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from nestify.errors import UnsupportedModelError
from nestify.model.graph.labels import Algebra, ChannelLabels, Shape
from nestify.model.graph.union_find import Nodes

Result = ChannelLabels | tuple[ChannelLabels, ...] | None


@dataclass
class Coupling(Algebra):
    """The algebra of labels, and what operators tell of channels beside what they tie.

    Attributes:
        channels: nodes that a weight multiplies. What no weight multiplies is a token, not a channel.
        mixed: (nodes, operator) where dropping a channel changes what is computed of the others (norms).
    """

    channels: list[Nodes] = field(default_factory=list)
    mixed: list[tuple[Nodes, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def mix(self, labels: ChannelLabels, dims: Sequence[int], operator: str) -> None:
        """Note that an operator computes with all channels along these dimensions together."""
        for dim in dims:
            if labels.is_live(dim):
                self.mixed.append((labels.nodes_of(dim), operator))


@dataclass(frozen=True)
class Call:
    """A call with its arguments by name; tensors are labels, symbolic sizes are numbers.

    Attributes:
        name: of the operator, see `operator_name`.
        shapes: of the tensors that it gives.
        used: whether anything uses each of them.
    """

    name: str
    arguments: dict[str, Any]
    shapes: tuple[Shape, ...]
    used: tuple[bool, ...]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or the default where it is absent or None."""
        value = self.arguments.get(name)
        return default if value is None else value

    @property
    def shape(self) -> Shape:
        """Of the first tensor that it gives."""
        return self.shapes[0]

    def tensors(self) -> list[ChannelLabels]:
        """Every tensor among the arguments, lists included."""
        found: list[ChannelLabels] = []
        for value in self.arguments.values():
            values = value if isinstance(value, list | tuple) else [value]
            found += [item for item in values if isinstance(item, ChannelLabels)]
        return found


Rule = Callable[[Coupling, Call], Result]
RULES: dict[str, Rule] = {}
"""Operator name to its rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


def operator_name(target: Any) -> str:
    """`aten.conv2d.default` -> `conv2d`; in-place names lose their underscore."""
    if not isinstance(target, torch._ops.OpOverload):
        return str(getattr(target, "__name__", target))
    name = target._schema.name.removeprefix("aten::")
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def place_of(node: fx.Node) -> str:
    """Operator and module of a call, such as `conv2d in layer1.0.conv1`, for messages."""
    stack = node.meta.get("nn_module_stack") or {}
    module = list(stack.values())[-1][0] if stack else ""
    return f"{operator_name(node.target)} in {module.removeprefix('L__self__') or 'the model'}"


def refusal(node: fx.Node, problem: str, parts: str = "channels") -> UnsupportedModelError:
    """An error about one call: what it does that the schedule of these parts of a model cannot follow."""
    return UnsupportedModelError(
        f"{place_of(node)} {problem}, so this model's {parts} cannot be scheduled; "
        "--schedule weight works for every model"
    )


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by the names of the operator's schema; defaults are left out."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def first(node: fx.Node) -> fx.Node:
    """The node that gives a call's first argument."""
    argument = node.args[0]
    assert isinstance(argument, fx.Node)
    return argument


def hinted(value: Any) -> Any:
    """A plain number for a symbolic one: its value in the example input."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.hint
    return value


def example_shape(tensor: torch.Tensor) -> Shape:
    """Sizes of a tensor of the example input, symbolic ones by their hints."""
    return tuple(int(hinted(size)) for size in tensor.shape)
