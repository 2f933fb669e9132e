"""Compute the numbers in a level's graph: sizes, convolution groups, slice bounds and padding.

All of them follow from the labels of the full network's graph.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import fx

from nestify.model.graph.axes import Choice, Kept
from nestify.model.graph.labels import ChannelLabels
from nestify.model.graph.operators import named_arguments, operator_name

Changes = dict[str, Any]
"""New values of a call's arguments, by name."""


@dataclass(frozen=True)
class Rewrite:
    """A call that is copied to a level's graph.

    Attributes:
        choice: the channels that the level keeps.
        node: the call in the graph of the full network.
        arguments: the arguments by name; nodes among them belong to the level's graph.
        graph: the level's graph, to which nodes that compute sizes are added.
    """

    choice: Choice
    node: fx.Node
    arguments: dict[str, Any]
    graph: fx.Graph

    @property
    def result(self) -> Any:
        """Labels of the call's result: of one tensor, or a tuple of them."""
        return self.choice.found.labels[self.node]

    def labels_of(self, argument: str) -> Any:
        """Return the labels of an argument; for a symbolic number, its value in the example input."""
        value = named_arguments(self.node)[argument]
        return self.choice.found.labels[value] if isinstance(value, fx.Node) else value

    def kept(self, argument: str, dim: int) -> Kept:
        """Return an (extent,) mask of the kept indices along an argument's dimension."""
        return self.choice.kept_along(self.labels_of(argument), dim)

    def scale(self, size: Any, new: int, old: int) -> Any:
        """Return `new` for a fixed size, and size * new / old for one that depends on the batch size."""
        if not isinstance(size, fx.Node):
            return new
        common = gcd(new, old)
        grown = self.graph.call_function(operator.mul, (size, new // common)) if new > common else size
        return self.graph.call_function(operator.floordiv, (grown, old // common)) if old > common else grown


Change = Callable[[Rewrite], Changes]
"""Returns the arguments of a call that change at the width of the level."""
CHANGES: dict[str, Change] = {}
"""Maps operator names to these functions. All other operators take their sizes from their tensors."""


def _changes(*names: str) -> Callable[[Change], Change]:
    def register(function: Change) -> Change:
        CHANGES.update(dict.fromkeys(names, function))
        return function

    return register


@_changes("view", "_unsafe_view", "expand", "broadcast_to", "zeros", "ones", "empty", "full")
@_changes("new_zeros", "new_ones", "new_empty", "new_full", "reshape", "unflatten")
def _sizes(call: Rewrite) -> Changes:
    """Change a list of sizes: the last sizes of the result; for `unflatten`, those from its dimension on."""
    name = next((name for name in ("size", "shape", "sizes") if name in call.arguments), None)
    if name is None:  # a view as another type
        return {}
    sizes = list(call.arguments[name])
    old, new = call.result.shape, call.choice.shape(call.result)
    start = call.arguments["dim"] % (len(old) - len(sizes) + 1) if name == "sizes" else len(old) - len(sizes)
    for k, size in enumerate(sizes):
        if old[start + k] != new[start + k] and not (isinstance(size, int) and size == -1):
            sizes[k] = call.scale(size, new[start + k], old[start + k])
    return {name: sizes}


@_changes("split", "split_with_sizes", "chunk")
def _split(call: Rewrite) -> Changes:
    dim = call.arguments.get("dim", 0)
    sizes = [call.choice.count(part, dim) for part in call.result]
    if sizes == [part.shape[dim] for part in call.result]:
        return {}
    return {"target": torch.ops.aten.split_with_sizes.default, "split_sizes": sizes}


@_changes("slice")
def _slice(call: Rewrite) -> Changes:
    dim = call.arguments.get("dim", 0)
    kept = call.kept("self", dim)
    if kept.all():
        return {}
    start = call.labels_of("start") if "start" in call.arguments else None
    start = 0 if start is None else start
    start = max(start + len(kept), 0) if start < 0 else start
    begin = int(np.count_nonzero(kept[:start]))
    return {"start": begin, "end": begin + call.choice.count(call.result, dim)}


@_changes("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d")
def _convolution(call: Rewrite) -> Changes:
    if "groups" not in call.arguments:
        return {}
    groups, kept = call.labels_of("groups"), call.kept("input", 1)
    channels = int(np.count_nonzero(kept))
    if "transpose" in operator_name(call.node.target):
        new = channels * groups // len(kept)
    else:
        new = channels // int(np.count_nonzero(call.kept("weight", 1)))
    return {"groups": call.scale(call.arguments["groups"], new, groups)} if new != groups else {}


@_changes("layer_norm", "rms_norm")
def _layer_norm(call: Rewrite) -> Changes:
    shape = call.choice.shape(call.result)
    return {"normalized_shape": list(shape[len(shape) - len(call.arguments["normalized_shape"]) :])}


@_changes("group_norm")
def _group_norm(call: Rewrite) -> Changes:
    groups = call.kept("input", 1).reshape(call.arguments["num_groups"], -1)
    return {"num_groups": int(np.count_nonzero(groups.any(axis=1)))}


@_changes("pad", "constant_pad_nd")
def _pad(call: Rewrite) -> Changes:
    labels, pads = call.result, list(call.arguments["pad"])
    for k in range(len(pads) // 2):
        kept = call.choice.kept_along(labels, labels.ndim - 1 - k)
        if not kept.all():
            low, high = pads[2 * k : 2 * k + 2]
            ends = kept[:low], kept[len(kept) - high :]
            pads[2 * k : 2 * k + 2] = (int(np.count_nonzero(end)) for end in ends)
    return {"pad": pads}


@_changes("repeat", "tile")
def _repeat(call: Rewrite) -> Changes:
    """Reduce the copies of a dimension of one index, which are channels; other copies follow the original."""
    name = "repeats" if "repeats" in call.arguments else "dims"
    source, times = call.labels_of("self"), list(call.arguments[name])
    new = call.choice.shape(call.result)
    for dim in range(-len(times), 0):
        extent = source.shape[dim] if -dim <= source.ndim else 1
        if extent == 1 and new[dim] != call.result.shape[dim]:
            times[dim] = new[dim]
    return {name: times}


@_changes("repeat_interleave")
def _repeat_interleave(call: Rewrite) -> Changes:
    source: ChannelLabels = call.labels_of("self")
    dim = call.arguments.get("dim")
    if dim is None or source.shape[dim] > 1:
        return {}
    return {"repeats": call.choice.count(call.result, dim)}


@_changes("scaled_dot_product_attention")
def _attention(call: Rewrite) -> Changes:
    """Keep the attention scale of the full network."""
    if call.arguments.get("scale") is not None or call.kept("query", -1).all():
        return {}
    return {"scale": call.labels_of("query").shape[-1] ** -0.5}
