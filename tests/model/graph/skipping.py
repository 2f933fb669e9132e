"""timm models with disabled blocks, as the reference for levels that skip these blocks."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from nestify.model.graph.block_map import BlockMap, map_blocks
from nestify.model.graph.blocks import Block
from nestify.model.graph.channel_map import ChannelMap, map_channels
from nestify.model.graph.macs import node_macs
from nestify.model.graph.node_facts import module_calls
from nestify.model.graph.operators import operator_name
from nestify.model.graph.skipping import prune_graph
from nestify.model.spec import state_tensors
from nestify.schedule.costs import count_macs
from tests.model.graph.builders import difference, load_tensors

ZERO_IF_ALL_ARE = (
    *("add", "sub", "view", "reshape", "reshape_as", "permute", "transpose", "flatten", "unflatten"),
    *("contiguous", "dropout", "slice", "squeeze", "unsqueeze"),
)


class NotComparable(Exception):
    """The block cannot be disabled, because no module does exactly what it does."""


@contextmanager
def disable_blocks(
    model: nn.Module, channels: ChannelMap, layers: BlockMap, names: Collection[str]
) -> Iterator[None]:
    """Disable blocks of a timm model.

    A block that is a module returns its input; for a block that is a branch, the modules of the branch return
    zeros.

    Raises:
        NotComparable: if no modules correspond to a block.
    """
    nodes = {node.name: node for node in channels.traced.graph.nodes}
    calls = {call.partition("@") for node in nodes.values() for call in module_calls(node)}
    several = {name for name, again, _ in calls if again}
    with ExitStack() as stack:
        for block in layers.blocks:
            if block.name not in names:
                continue
            if block.is_module:
                modules, output_of = [block.name], _first_like
            else:
                ((add, trunk),) = layers.replacements([block.name]).items()
                (branch,) = (node for node in nodes[add].args if node is not nodes[trunk])
                modules, output_of = _source_modules(branch, module_calls(nodes[add])), _zeros
            for name in modules:
                if name.partition("@")[0] in several:
                    raise NotComparable(f"{name} is one of several calls of a module")
                stack.enter_context(_replace_output(model, name, output_of))
        yield


def _source_modules(node: object, outer: tuple[str, ...]) -> list[str]:
    """Find modules inside `outer` whose zero outputs make a node zero."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        raise NotComparable(f"{node} is not in a module")
    calls = module_calls(node)
    if len(calls) > len(outer) and calls[: len(outer)] == outer:
        return [calls[len(outer)]]
    name, tensors = operator_name(node.target), [arg for arg in node.args if isinstance(arg, fx.Node)]
    if name in ZERO_IF_ALL_ARE:
        return [module for source in _data(tensors) for module in _source_modules(source, outer)]
    for source in tensors if name == "mul" else []:
        try:
            return _source_modules(source, outer)
        except NotComparable:
            continue
    raise NotComparable(f"{node} is not in a module")


def _data(nodes: Collection[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if isinstance(node.meta["val"], Tensor)]


@contextmanager
def _replace_output(model: nn.Module, name: str, output_of: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Replace a module's output by a function of its inputs and its output."""
    module = model.get_submodule(name)
    if sum(other is module for _, other in model.named_modules(remove_duplicate=False)) > 1:
        raise NotComparable(f"{name} has other names")
    forward = module.forward

    def replaced(*args: Any, **kwargs: Any) -> Any:
        copies = tree_map_only(Tensor, Tensor.clone, (args, kwargs))  # the module may write into them
        return output_of((args, kwargs), forward(*copies[0], **copies[1]))

    with patch.object(module, "forward", replaced):
        yield


def _zeros(inputs: Any, output: Any) -> Any:
    return tree_map_only(Tensor, torch.zeros_like, output)


def _first_like(inputs: Any, output: Any) -> Any:
    """Replace the output's first tensor by the first input of the same shape and type."""
    given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    leaves, tree = tree_flatten(output)
    place = next(k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    like = leaves[place]
    same = [tensor for tensor in given if (tensor.shape, tensor.dtype) == (like.shape, like.dtype)]
    if not same:
        raise NotComparable("no input has the shape of the output")
    leaves[place] = same[0]
    return tree_unflatten(leaves, tree)


def some_blocks(blocks: Collection[Block], seed: int) -> list[str]:
    """Choose half of the blocks at random, at least one, and return their names."""
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    return [list(blocks)[place].name for place in sorted(order[: (len(blocks) + 1) // 2])]


@dataclass(frozen=True)
class WalkResult:
    """The blocks of a model, and the errors of levels without them.

    Attributes:
        additions: number of additions in its graph.
        modules: number of blocks that are modules.
        branches: number of blocks that are branches.
        share: share of the MACs that are in blocks.
        error: largest difference to timm's logits, relative to the largest logit.
        compared: number of sets of blocks whose levels were compared with timm.
        tried: number of sets of blocks that were skipped.
    """

    additions: int
    modules: int = 0
    branches: int = 0
    share: float = 0.0
    error: float = 0.0
    compared: int = 0
    tried: int = 0


def walk_blocks(model: nn.Module, images: Tensor) -> WalkResult:
    """Skip all blocks of a timm model, and some of them, and compare with the model with disabled blocks.

    Args:
        model: a model in evaluation mode, all of whose parameters affect the logits.
        images: (B, C, H, W), of the model's type.

    Raises:
        AssertionError: if a level has wrong logits, tensors or MACs.
    """
    size = tuple(images.shape[1:])
    channels = map_channels(model, size)
    layers = map_blocks(channels)
    additions = sum(operator_name(node.target) == "add" for node in channels.traced.graph.nodes)
    if not layers.blocks:
        return WalkResult(additions)
    macs = node_macs(channels.traced).macs
    every = [block.name for block in layers.blocks]
    modules = [block.name for block in layers.blocks if block.is_module]
    sets = [every, *(some_blocks(layers.blocks, seed) for seed in range(2)), every[len(every) // 2 :][:1]]
    sets += [modules] if 0 < len(modules) < len(every) else []
    errors = []
    for names in sets:
        level = _level(channels, layers, names, model)
        with torch.no_grad():
            logits = level(images)
        assert torch.isfinite(logits).all(), f"logits that are not finite without {names}"
        pruned_graph = prune_graph(channels.traced.graph, layers.replacements(names))
        planned = sum(macs.get(node, 0) for node in pruned_graph.needed)
        counted = count_macs(level, size).total
        assert planned == counted, f"{planned} MACs planned, {counted} counted without {names}"
        try:
            with disable_blocks(model, channels, layers, names):
                errors.append(_compare(model, level, images, logits))
        except NotComparable:
            continue
    share = sum(block.macs for block in layers.blocks) / sum(macs.values())
    branches = len(every) - len(modules)
    error = max(errors, default=0.0)
    return WalkResult(additions, len(modules), branches, share, error, len(errors), len(sets))


def _level(
    channels: ChannelMap, layers: BlockMap, names: Collection[str], model: nn.Module
) -> fx.GraphModule:
    level = channels.skeleton(
        {}, training=False, device=torch.device("cpu"), replacements=layers.replacements(names)
    )
    assert set(level.state_dict()) == set(channels.names) - layers.unused_names(names)
    tensors = state_tensors(model)
    return load_tensors(level, {name: tensors[name] for name in level.state_dict()})


def _compare(model: nn.Module, level: nn.Module, images: Tensor, logits: Tensor) -> float:
    """Return the relative error of a level's logits, and check that both networks use the same parameters."""
    model.train().eval().zero_grad()  # train() clears the caches of models such as LeViT
    with torch.enable_grad():
        expected = model(images)
        expected.square().sum().backward()
    used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    have = {name for name, parameter in level.named_parameters() if parameter.requires_grad}
    assert used == have, f"parameters of one network only: {sorted(used ^ have)[:4]}"
    return difference(logits, expected) / float(expected.detach().abs().max())
