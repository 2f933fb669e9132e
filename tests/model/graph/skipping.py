"""timm's own models in which blocks do nothing: what a level that skips them has to give."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from nestify.model.graph.block_map import LayerMap, find_layers
from nestify.model.graph.blocks import Block
from nestify.model.graph.channel_map import ChannelMap, find_channels
from nestify.model.graph.macs import node_macs
from nestify.model.graph.node_facts import module_calls
from nestify.model.graph.operators import operator_name
from nestify.model.graph.skipping import remains_of
from nestify.model.spec import state_tensors
from nestify.schedule.costs import count_macs
from tests.model.graph.builders import difference, loaded

ZERO_IF_ALL_ARE = (
    *("add", "sub", "view", "reshape", "reshape_as", "permute", "transpose", "flatten", "unflatten"),
    *("contiguous", "dropout", "slice", "squeeze", "unsqueeze"),
)


class Untold(Exception):
    """There is no module that does what the block does, and nothing else."""


@contextmanager
def without(
    model: nn.Module, channels: ChannelMap, layers: LayerMap, names: Collection[str]
) -> Iterator[None]:
    """Let blocks of a timm model do nothing.

    A module gives its input instead of its output; of a branch alone, the modules that give it give zeros.

    Raises:
        Untold: where modules do not tell what the block is.
    """
    nodes = {node.name: node for node in channels.traced.graph.nodes}
    calls = {call.partition("@") for node in nodes.values() for call in module_calls(node)}
    several = {name for name, again, _ in calls if again}
    with ExitStack() as stack:
        for block in layers.blocks:
            if block.name not in names:
                continue
            if block.whole:
                modules, what = [block.name], _first_like
            else:
                ((add, trunk),) = layers.substitutes([block.name]).items()
                (branch,) = (node for node in nodes[add].args if node is not nodes[trunk])
                modules, what = _giving(branch, module_calls(nodes[add])), _zeros
            for name in modules:
                if name.partition("@")[0] in several:
                    raise Untold(f"{name} is one of several calls of a module")
                stack.enter_context(_replaced(model, name, what))
        yield


def _giving(node: object, outer: tuple[str, ...]) -> list[str]:
    """Modules inside `outer` that, where all of them give zeros, make this node zero."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        raise Untold(f"{node} is of no module")
    calls = module_calls(node)
    if len(calls) > len(outer) and calls[: len(outer)] == outer:
        return [calls[len(outer)]]
    name, tensors = operator_name(node.target), [arg for arg in node.args if isinstance(arg, fx.Node)]
    if name in ZERO_IF_ALL_ARE:
        return [module for source in _data(tensors) for module in _giving(source, outer)]
    for source in tensors if name == "mul" else []:
        try:
            return _giving(source, outer)
        except Untold:
            continue
    raise Untold(f"{node} is of no module")


def _data(nodes: Collection[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if isinstance(node.meta["val"], Tensor)]


@contextmanager
def _replaced(model: nn.Module, name: str, what: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Let `what` make a module's output of its inputs and its output."""
    module = model.get_submodule(name)
    if sum(other is module for _, other in model.named_modules(remove_duplicate=False)) > 1:
        raise Untold(f"{name} has other names")
    forward = module.forward

    def replaced(*args: Any, **kwargs: Any) -> Any:
        copies = tree_map_only(Tensor, Tensor.clone, (args, kwargs))  # it may write into them
        return what((args, kwargs), forward(*copies[0], **copies[1]))

    with patch.object(module, "forward", replaced):
        yield


def _zeros(inputs: Any, output: Any) -> Any:
    return tree_map_only(Tensor, torch.zeros_like, output)


def _first_like(inputs: Any, output: Any) -> Any:
    """The output, but for its first tensor, which is the first input of its shape and type."""
    given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    leaves, tree = tree_flatten(output)
    place = next(k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    like = leaves[place]
    same = [tensor for tensor in given if (tensor.shape, tensor.dtype) == (like.shape, like.dtype)]
    if not same:
        raise Untold("no input has the shape of the output")
    leaves[place] = same[0]
    return tree_unflatten(leaves, tree)


def some_blocks(blocks: Collection[Block], seed: int) -> list[str]:
    """Names of half of the blocks, at least one."""
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    return [list(blocks)[place].name for place in sorted(order[: (len(blocks) + 1) // 2])]


@dataclass(frozen=True)
class Walked:
    """What a model's blocks are.

    Attributes:
        additions: how many there are in its graph.
        modules: how many blocks are modules. `branches`: how many are not.
        share: of the MACs that are in blocks.
        off: largest difference to timm's logits, relative to the largest of them.
        compared: sets of blocks that could be compared, of `tried` ones.
    """

    additions: int
    modules: int = 0
    branches: int = 0
    share: float = 0.0
    off: float = 0.0
    compared: int = 0
    tried: int = 0


def walk_blocks(model: nn.Module, images: Tensor) -> Walked:
    """Skip all blocks of a timm model, and some; compare with the model in which they do nothing.

    Args:
        model: in evaluation mode, with parameters of which none is without effect.
        images: (B, C, H, W), of the model's type.

    Raises:
        AssertionError: where a level has other logits, tensors or MACs than it should have.
    """
    size = tuple(images.shape[1:])
    channels = find_channels(model, size)
    layers = find_layers(channels)
    additions = sum(operator_name(node.target) == "add" for node in channels.traced.graph.nodes)
    if not layers.blocks:
        return Walked(additions)
    macs = node_macs(channels.traced).macs
    every = [block.name for block in layers.blocks]
    whole = [block.name for block in layers.blocks if block.whole]
    sets = [every, *(some_blocks(layers.blocks, seed) for seed in range(2)), every[len(every) // 2 :][:1]]
    sets += [whole] if 0 < len(whole) < len(every) else []
    offs = []
    for names in sets:
        level = _level(channels, layers, names, model)
        with torch.no_grad():
            logits = level(images)
        assert torch.isfinite(logits).all(), f"logits that are not finite without {names}"
        remains = remains_of(channels.traced.graph, layers.substitutes(names))
        planned = sum(macs.get(node, 0) for node in remains.needed)
        counted = count_macs(level, size).total
        assert planned == counted, f"{planned} MACs planned, {counted} counted without {names}"
        try:
            with without(model, channels, layers, names):
                offs.append(_compared(model, level, images, logits))
        except Untold:
            continue
    modules = sum(block.whole for block in layers.blocks)
    share = sum(block.macs for block in layers.blocks) / sum(macs.values())
    off = max(offs, default=0.0)
    return Walked(additions, modules, len(every) - modules, share, off, len(offs), len(sets))


def _level(
    channels: ChannelMap, layers: LayerMap, names: Collection[str], model: nn.Module
) -> fx.GraphModule:
    level = channels.skeleton(
        {}, training=False, device=torch.device("cpu"), substitutes=layers.substitutes(names)
    )
    assert set(level.state_dict()) == set(channels.names) - layers.missing(names)
    tensors = state_tensors(model)
    return loaded(level, {name: tensors[name] for name in level.state_dict()})


def _compared(model: nn.Module, level: nn.Module, images: Tensor, logits: Tensor) -> float:
    """How far a level's logits are from the model's; both depend on the same parameters."""
    model.train().eval().zero_grad()  # LeViT and its kin drop what they keep in evaluation
    with torch.enable_grad():
        expected = model(images)
        expected.square().sum().backward()
    used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    have = {name for name, parameter in level.named_parameters() if parameter.requires_grad}
    assert used == have, f"parameters of one network only: {sorted(used ^ have)[:4]}"
    return difference(logits, expected) / float(expected.detach().abs().max())
