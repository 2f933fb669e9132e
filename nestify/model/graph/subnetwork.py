"""Build a level's network: the graph with the level's sizes, and tensors of the level's shapes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nestify.errors import NestifyError, foreign_code
from nestify.model.graph.axes import Choice, NotABox
from nestify.model.graph.labels import ChannelLabels
from nestify.model.graph.operators import example_shape, named_arguments, operator_name, refusal
from nestify.model.graph.sizes import CHANGES, Rewrite
from nestify.model.graph.skipping import PrunedGraph
from nestify.model.graph.trace import BATCH

CPU = torch.device("cpu")
_TRAINING_FLAGS = {
    "batch_norm": "training",
    "dropout": "train",
    "feature_dropout": "train",
    "alpha_dropout": "train",
}
"""Maps each operator that works differently in training to the argument that switches it."""


def build_network(
    choice: Choice,
    pruned_graph: PrunedGraph,
    constants: Mapping[str, Tensor],
    *,
    training: bool,
    device: torch.device,
) -> fx.GraphModule:
    """Build the network of a level.

    Args:
        choice: the channels that the level keeps.
        pruned_graph: the operators that the level keeps.
        constants: non-persistent buffers and constants by name, cut to the level.
        training: True makes batch norm use the statistics of the batch, and dropout drop.
        device: device of the constants and of tensors that operators such as `zeros` make.

    Returns:
        A module whose parameters and persistent buffers have the names of the full model, no values, and
        the shapes of the level.

    Raises:
        UnsupportedModelError: if the graph does not run with the shapes that the labels determine.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in choice.found.traced.graph.nodes:
        if node not in pruned_graph.needed:
            continue
        try:
            copies[node] = _copy_node(
                choice, node, graph, lambda n: copies[pruned_graph.replacements.get(n, n)]
            )
        except NotABox as error:
            raise refusal(node, "keeps channels that do not form a rectangular tensor") from error
        if node.target is torch.ops.aten.view.default and node not in pruned_graph.written:
            copies[node].target = torch.ops.aten.reshape.default  # the strides may differ
    graph.eliminate_dead_code()
    root = _make_root(choice, constants, device)
    _check_shapes(choice, graph, copies, root)
    for node in graph.nodes:
        if node.op == "call_function":
            _finish(node, training, device)
    graph.lint()
    level = fx.GraphModule(root, graph, class_name="Level")
    used = dict(level.named_buffers())
    for name in constants.keys() & used.keys():  # before torch 2.12, GraphModule makes all buffers persistent
        module, _, local = name.rpartition(".")
        level.get_submodule(module)._non_persistent_buffers_set.add(local)
    return level


def _copy_node(
    choice: Choice, node: fx.Node, graph: fx.Graph, copy_of: Callable[[fx.Node], fx.Node]
) -> fx.Node:
    names = choice.found.traced.names
    if node in names:
        return graph.get_attr(names[node])
    args, kwargs = fx.map_arg((node.args, node.kwargs), copy_of)
    if node.op == "placeholder":
        return graph.placeholder("images")
    if node.op == "output":
        outputs = [copy_of(output) for output in choice.found.traced.outputs]
        copy: fx.Node = graph.output(outputs if choice.found.traced.returns_list else outputs[0])
        return copy
    change = CHANGES.get(operator_name(node.target))
    if change is None:
        assert callable(node.target)
        return graph.call_function(node.target, args, kwargs)
    arguments = fx.map_arg(named_arguments(node), copy_of)
    changes = change(Rewrite(choice, node, arguments, graph))
    return _add_call(graph, changes.pop("target", node.target), arguments | changes)


def _add_call(graph: fx.Graph, target: Any, arguments: Mapping[str, Any]) -> fx.Node:
    """Add a call with positional arguments where possible, so that the generated code is readable."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for place, argument in enumerate(target._schema.arguments):
        if argument.name not in arguments:
            continue
        if not argument.kwarg_only and len(args) == place:
            args.append(arguments[argument.name])
        else:
            kwargs[argument.name] = arguments[argument.name]
    return graph.call_function(target, tuple(args), kwargs)


def _make_root(choice: Choice, constants: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """Make a module tree that holds the level's tensors under the names of the full model."""
    root = nn.Module()
    for node, name in choice.found.traced.names.items():
        *path, local = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if name in constants:
            module.register_buffer(local, constants[name].to(device), persistent=False)
            continue
        full = node.meta["val"]
        tensor = torch.empty(choice.shape(choice.found.labels[node]), dtype=full.dtype, device="meta")
        if name in choice.found.traced.parameters:
            module.register_parameter(local, nn.Parameter(tensor, full.requires_grad))
        else:
            module.register_buffer(local, tensor)
    return root


def _check_shapes(
    choice: Choice, graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], root: nn.Module
) -> None:
    """Run the graph on shapes alone, and check every tensor against the shape of its labels.

    Raises:
        UnsupportedModelError: if an operator fails, or a tensor has another shape.
    """
    original = {copy: node for node, copy in copies.items()}
    state = dict(root.named_parameters()) | dict(root.named_buffers())
    images = choice.found.traced.images.meta["val"]
    values: dict[fx.Node, Any] = {}
    with FakeTensorMode():
        for node in graph.nodes:
            if node.op == "get_attr":
                values[node] = _empty_like(state[node.target])
            elif node.op == "placeholder":
                values[node] = torch.empty(BATCH, *images.shape[1:], dtype=images.dtype)
            elif node.op == "call_function":
                values[node] = _run_on_shapes(node, original.get(node, node), values)
            labels = choice.found.labels.get(original.get(node, node))
            if isinstance(labels, ChannelLabels) and example_shape(values[node]) != choice.shape(labels):
                got, expected = example_shape(values[node]), choice.shape(labels)
                raise refusal(original[node], f"returns shape {got} and not {expected} in a smaller level")


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _run_on_shapes(node: fx.Node, original: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
    args, kwargs = fx.node.map_aggregate((args, kwargs), lambda arg: _replace_device(CPU, arg))
    assert callable(node.target)

    def describe(reason: str) -> NestifyError:
        return refusal(original, f"does not run in a smaller level ({reason.rstrip(' .:')})")

    with foreign_code(describe):
        return node.target(*args, **kwargs)


def _finish(node: fx.Node, training: bool, device: torch.device) -> None:
    """Set the device of operators such as `zeros`, and the training flag of batch norm and dropout."""
    node.args, node.kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda arg: _replace_device(device, arg)
    )
    flag = _TRAINING_FLAGS.get(operator_name(node.target))
    if training and flag is not None:
        node.update_arg(list(named_arguments(node)).index(flag), True)


def _replace_device(device: torch.device, argument: Any) -> Any:
    return device if isinstance(argument, torch.device) else argument
