"""Trace a model as a flat, functional graph of ATen operators with a free batch size."""

import operator
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind

from nestify.errors import UnsupportedModelError
from nestify.model.graph.memory import make_functional
from nestify.model.graph.skipping import needed_nodes
from nestify.model.spec import returns_feature_maps, tied_names

BATCH = 11
"""Number of images in the example input: a prime, so that no reshape confuses it with another size."""


@dataclass(frozen=True)
class Traced:
    """A model in evaluation mode as a flat graph.

    Attributes:
        graph: placeholders, calls of operators, and an output of one or more tensors. Operators write in
            place only where `make_functional` could not replace them.
        images: the placeholder of the images, (B, C, H, W).
        names: maps each other placeholder, all of which are used, to the name of its tensor: parameters and
            buffers have their state-dict names, tied ones the first; constants have their names in the graph.
        parameters: the names that belong to parameters.
        constants: values of the tensors that are not in the state dict: non-persistent buffers and constants.
        returns_list: whether the model returns a list of feature maps, and not one tensor.
    """

    graph: fx.Graph
    images: fx.Node
    names: Mapping[fx.Node, str]
    parameters: frozenset[str]
    constants: Mapping[str, Tensor]
    returns_list: bool = False

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes whose values the model returns."""
        return output_nodes(self.graph)


def trace(model: nn.Module, input_size: tuple[int, int, int]) -> Traced:
    """Trace a model in evaluation mode; the model itself stays as it is.

    Regions without autocast or gradients are inlined in the graph.

    Args:
        model: a model on any device.
        input_size: (channels, height, width) of the images, in pixels.

    Raises:
        UnsupportedModelError: if torch cannot trace the model with a free batch size, or it returns several
            tensors.
    """
    program = _export(model, input_size)
    _inline_regions(program)
    graph = program.graph
    placeholders = {node.name: node for node in graph.find_nodes(op="placeholder")}
    inputs = {placeholders[spec.arg.name]: spec for spec in program.graph_signature.input_specs}
    images = next(node for node, spec in inputs.items() if spec.kind == InputKind.USER_INPUT)
    names = {node: str(spec.target) for node, spec in inputs.items() if node is not images}
    _tie(names, tied_names(model))
    _remove_unused(graph, names)  # includes assertions, which read what is written
    make_functional(graph)
    _remove_unused(graph, names)  # what was written may not be read any more
    _check_output(graph, model)
    graph.lint()
    state = model.state_dict()
    return Traced(
        graph=graph,
        images=images,
        names=names,
        parameters=frozenset(names.values()) & {name for name, _ in model.named_parameters()},
        constants={
            name: program.constants[name].detach().clone() for name in names.values() if name not in state
        },
        returns_list=returns_feature_maps(model),
    )


def output_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes whose values a graph returns, in order."""
    (returned,) = graph.output_node().args
    assert isinstance(returned, list | tuple)
    return [node for node in returned if isinstance(node, fx.Node)]


def _export(model: nn.Module, input_size: tuple[int, int, int]) -> ExportedProgram:
    """Export a copy that shares the model's tensors, because tracing may change its modules."""
    tensors = list(chain(model.parameters(), model.buffers()))
    images = torch.zeros(BATCH, *input_size, dtype=tensors[0].dtype, device=tensors[0].device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from torch and from the model's code
            # Models such as LeViT cache values computed from their parameters; train() clears them.
            copy = deepcopy(model, {id(tensor): tensor for tensor in tensors}).train().eval()
            return export(copy, (images,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)
    except Exception as error:  # tracing a model may raise any exception
        reason = str(error).strip().partition("\n")[0].rstrip(" .:")
        raise UnsupportedModelError(
            f"torch cannot trace {type(model).__name__} for images of {input_size} and any batch size "
            f"({type(error).__name__}: {reason}); --schedule weight works for every model"
        ) from error


def _inline_regions(program: ExportedProgram) -> None:
    """Replace calls to autocast and no-grad regions by the graphs of the regions."""
    graph = program.graph
    while calls := [node for node in graph.nodes if "wrap_with" in str(node.target)]:
        for call in calls:
            index, module = next((k, arg) for k, arg in enumerate(call.args) if _is_module(arg))
            inner = program.graph_module.get_submodule(module.target).graph
            _inline(graph, call, inner, call.args[index + 1 :])
            if not module.users:
                graph.erase_node(module)


def _is_module(argument: object) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _inline(graph: fx.Graph, call: fx.Node, inner: fx.Graph, arguments: tuple[object, ...]) -> None:
    inputs = inner.find_nodes(op="placeholder")
    values: dict[fx.Node, object] = dict(zip(inputs, arguments, strict=True))
    with graph.inserting_before(call):
        results = graph.graph_copy(inner, values)  # type: ignore[arg-type]
    results = results if isinstance(results, tuple | list) else (results,)
    for user in list(call.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[int(str(user.args[1]))])
        graph.erase_node(user)
    graph.erase_node(call)


def _tie(names: dict[fx.Node, str], aliases: Mapping[str, str]) -> None:
    """Make every use of a tied tensor a use of its first name; torch uses the last."""
    node_of = {name: node for node, name in names.items()}
    for alias, name in aliases.items():
        if alias in node_of:
            node_of[alias].replace_all_uses_with(node_of[name])


def _remove_unused(graph: fx.Graph, names: dict[fx.Node, str]) -> None:
    """Remove nodes that the output does not depend on, including assertions, and their names."""
    needed = needed_nodes(graph, {})
    for node in reversed(graph.nodes):
        if node not in needed and (node.op != "placeholder" or node in names):
            graph.erase_node(node)
            names.pop(node, None)


def _check_output(graph: fx.Graph, model: nn.Module) -> None:
    outputs = output_nodes(graph)
    if len(outputs) != 1 and not returns_feature_maps(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} returns {len(outputs)} tensors and not one tensor of logits; switch its "
            "auxiliary or distillation outputs off (set_distilled_training(False))"
        )
