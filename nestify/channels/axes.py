"""Axes: which indices of which tensors are kept, how a tensor is cut to them, how they are put in order."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestify.model.spec import state_tensors

if TYPE_CHECKING:
    from nestify.channels.channel_map import ChannelMap

Indices = NDArray[np.int64]
"""(kept,) places that are kept, ascending: indices of a dimension, or units of a group."""

Axes = Mapping[str, Mapping[int, Indices]]
"""Name of a tensor -> dimension -> indices that are kept; a dimension that is absent is whole."""


def sliced(tensor: Tensor, axes: Mapping[int, Indices]) -> Tensor:
    """Cut a tensor to the indices that are kept of its dimensions; differentiable.

    Returns:
        a view where the kept indices of every dimension follow each other, a copy otherwise.
    """
    for dim, kept in axes.items():
        if len(kept) and int(kept[-1]) - int(kept[0]) == len(kept) - 1:
            tensor = tensor.narrow(dim, int(kept[0]), len(kept))
        else:
            tensor = tensor.index_select(dim, torch.as_tensor(kept, device=tensor.device))
    return tensor


@torch.no_grad()
def permute_channels(model: nn.Module, channel_map: "ChannelMap", orders: Sequence[Indices]) -> None:
    """Permute the units of every group, in place.

    Tensors that the logits of evaluation mode do not depend on stay as they are.

    Args:
        model: the one that `channel_map` was found in, or another one of the same architecture.
        orders: per group a permutation of its units; unit `orders[g][u]` moves to place u.

    Raises:
        ValueError: if one is no permutation of the group's units.
    """
    moves: dict[tuple[str, int], Indices] = {}
    tensors = state_tensors(model)
    for number, (group, order) in enumerate(zip(channel_map.groups, orders, strict=True)):
        if not np.array_equal(np.sort(order), np.arange(group.units)):
            raise ValueError(f"orders[{number}] is no permutation of {group.units} units")
        for member in group.members:
            if member.name in tensors:
                extent = tensors[member.name].shape[member.dim]
                move = moves.setdefault((member.name, member.dim), np.arange(extent))
                move[member.indices] = member.indices[order]
    for (name, dim), move in moves.items():
        tensor = tensors[name]
        tensor.copy_(tensor.index_select(dim, torch.as_tensor(move, device=tensor.device)))
    # LeViT and its kin keep what they computed of their parameters in evaluation until they train again.
    was_training = model.training
    model.train().train(was_training)
