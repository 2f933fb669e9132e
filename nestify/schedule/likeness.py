"""Order of channels for blocks of several inputs: like ones become neighbours, and logits do not change.

A pattern such as 1x4 keeps or drops four consecutive input channels of an output together. It keeps more of
the weights' energy if channels that matter for the same outputs are consecutive.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestify.accelerator import as_float64
from nestify.errors import UnsupportedModelError
from nestify.model.graph.channel_map import map_channels, permute_channels
from nestify.model.graph.groups import Group
from nestify.model.spec import ModelSpec, state_tensors
from nestify.recipe.levels import Level
from nestify.schedule.blocks import Removable


def inputs_per_block(levels: Sequence[Level]) -> int:
    """Return how many input channels of one output the levels' pattern keeps or drops together, often 1."""
    patterns = [level.pattern for level in levels if level.sparsity > 0]
    return max((p.cols for p in patterns if p.kind == "block" and p.rows == 1), default=1)


def group_channels(
    network: nn.Module, spec: ModelSpec, levels: Sequence[Level], removable: Removable | None
) -> str | None:
    """Move like channels of a network together, in place, if blocks of the pattern have several inputs.

    The logits do not change.

    Args:
        network: a timm model, on any device.
        spec: its description.
        levels: core first.
        removable: its channels, if they are known already.

    Returns:
        Why the channels stay in their order although the pattern has several inputs; None if there is nothing
        to tell.
    """
    if (size := inputs_per_block(levels)) == 1:
        return None
    try:
        channels = map_channels(network, spec.input_size) if removable is None else removable.channels
    except UnsupportedModelError as error:
        return (
            f"pattern 1x{size} keeps more of the weights if like input channels are consecutive, but they "
            f"stay in their order, because {error}"
        )
    permute_channels(network, channels, likeness_orders(channels.groups, state_tensors(network), size))
    return None


@torch.no_grad()
def likeness_orders(
    groups: Sequence[Group], tensors: Mapping[str, Tensor], size: int
) -> list[NDArray[np.int64]]:
    """Return an order of the units of every group in which sets of `size` consecutive units are alike.

    Sets are filled one after the other: the unit with the most energy that is left, then those whose squared
    weights have the largest products with the set's, summed over the outputs that read them. For sets of one
    size, the sum of the squares of all blocks' energies grows with these products.

    Args:
        groups: the coupled channels.
        tensors: state-dict name -> parameter or buffer of the network.
        size: units of a set.

    Returns:
        Per group (units,); the units in their order if no weight reads them one by one, or if the model
        returns them.
    """
    return [
        np.arange(group.units) if group.in_output else _order(_energies(group, tensors), size)
        for group in groups
    ]


def _energies(group: Group, tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """Return the squared weights that read each unit, (units, weights); their mean is 1 in every tensor."""
    found = [np.zeros((group.units, 0))]
    for member in group.members:
        weight = tensors.get(member.name)
        is_read = weight is not None and weight.ndim >= 2 and member.dim == 1 and weight.is_floating_point()
        if weight is None or not is_read or member.indices.shape[1] != 1:
            continue
        rows = as_float64(weight.detach()).transpose(0, 1).flatten(1).square().cpu().numpy()
        rows = rows[member.indices[:, 0]]
        found.append(rows / max(float(rows.mean()), np.finfo(np.float64).tiny))
    return np.concatenate(found, axis=1)


def _order(energies: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    units = len(energies)
    if not energies.shape[1]:
        return np.arange(units)
    products = energies @ energies.T
    left = np.ones(units, bool)
    order: list[int] = []
    gain = products.diagonal()
    for place in range(units):
        if place % size == 0:
            gain = products.diagonal()
        best = int(np.where(left, gain, -np.inf).argmax())
        gain = products[best] if place % size == 0 else gain + products[best]
        left[best] = False
        order.append(best)
    return np.array(order, np.int64)
