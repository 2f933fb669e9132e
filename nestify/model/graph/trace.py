"""A model as a flat, functional graph of ATen operators with a free batch size."""

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
from nestify.model.spec import tied_names

BATCH = 11
"""Images in the example: a prime, so that no reshape takes their number for something else."""


@dataclass(frozen=True)
class Traced:
    """A model in evaluation mode as a flat graph.

    Attributes:
        graph: placeholders, calls of operators, one output, which is one tensor. Operators write in place
            only where `make_functional` has left it at that.
        images: the placeholder of the images, (B, C, H, W).
        names: the other placeholders, all of them used, to the names of the tensors that they stand for:
            parameters and buffers by their state-dict names, tied ones by the first; constants by their
            names in the graph.
        parameters: which of the names are parameters.
        constants: values of the tensors that no state dict holds: non-persistent buffers and constants.
    """

    graph: fx.Graph
    images: fx.Node
    names: Mapping[fx.Node, str]
    parameters: frozenset[str]
    constants: Mapping[str, Tensor]


def trace(model: nn.Module, input_size: tuple[int, int, int]) -> Traced:
    """Trace a model in evaluation mode; the model itself stays as it is.

    Regions with autocast or gradients off become part of the graph like everything else.

    Args:
        model: on any device.
        input_size: (channels, height, width) of the images, in pixels.

    Raises:
        UnsupportedModelError: if torch cannot trace it with a free batch size, or it gives several tensors.
    """
    program = _exported(model, input_size)
    _inline_regions(program)
    graph = program.graph
    placeholders = {node.name: node for node in graph.find_nodes(op="placeholder")}
    inputs = {placeholders[spec.arg.name]: spec for spec in program.graph_signature.input_specs}
    images = next(node for node, spec in inputs.items() if spec.kind == InputKind.USER_INPUT)
    names = {node: str(spec.target) for node, spec in inputs.items() if node is not images}
    _tie(names, tied_names(model))
    _remove_unused(graph, names)  # assertions are among it, and read what is written
    make_functional(graph)
    _remove_unused(graph, names)  # what was written may be read no more
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
    )


def logits_of(graph: fx.Graph) -> fx.Node:
    """The node that gives the graph's one result."""
    (logits,) = graph.output_node().all_input_nodes
    return logits


def _exported(model: nn.Module, input_size: tuple[int, int, int]) -> ExportedProgram:
    """Trace a copy whose tensors are the model's own: tracing may leave traces in its modules."""
    tensors = list(chain(model.parameters(), model.buffers()))
    images = torch.zeros(BATCH, *input_size, dtype=tensors[0].dtype, device=tensors[0].device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's and the model's own making
            # LeViT and its kin keep what they computed of their parameters until they train again.
            twin = deepcopy(model, {id(tensor): tensor for tensor in tensors}).train().eval()
            return export(twin, (images,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)
    except Exception as error:  # whatever tracing raises is about this model
        reason = str(error).strip().partition("\n")[0].rstrip(" .:")
        raise UnsupportedModelError(
            f"torch cannot trace {type(model).__name__} for images of {input_size} and any batch size "
            f"({type(error).__name__}: {reason}); --schedule weight works for every model"
        ) from error


def _inline_regions(program: ExportedProgram) -> None:
    """Put the graphs of autocast and no-grad regions in the place of the calls to them."""
    graph = program.graph
    while calls := [node for node in graph.nodes if "wrap_with" in str(node.target)]:
        for call in calls:
            at, holder = next((k, arg) for k, arg in enumerate(call.args) if _is_module(arg))
            inner = program.graph_module.get_submodule(holder.target).graph
            _inline(graph, call, inner, call.args[at + 1 :])
            if not holder.users:
                graph.erase_node(holder)


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
    """Let every use of a tied tensor be a use of its first name; torch takes the last."""
    node_of = {name: node for node, name in names.items()}
    for alias, name in aliases.items():
        if alias in node_of:
            node_of[alias].replace_all_uses_with(node_of[name])


def _remove_unused(graph: fx.Graph, names: dict[fx.Node, str]) -> None:
    """Remove what does not reach the output, assertions about the example among it, and names of nothing."""
    needed = needed_nodes(graph, {})
    for node in reversed(graph.nodes):
        if node not in needed and (node.op != "placeholder" or node in names):
            graph.erase_node(node)
            names.pop(node, None)


def _check_output(graph: fx.Graph, model: nn.Module) -> None:
    outputs = graph.output_node().all_input_nodes
    if len(outputs) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives {len(outputs)} tensors and not one of logits; switch its "
            "auxiliary or distillation outputs off (set_distilled_training(False))"
        )
