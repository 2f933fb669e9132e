"""The tensors that a network returns: one, or the feature maps of a backbone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nestify.errors import UnsupportedModelError
from nestify.model.spec import ModelSpec, synthetic_input

Outputs = Tensor | list[Tensor]
"""Logits or an embedding (B, C), or a list of feature maps (B, C, H, W) or (B, H, W, C)."""


def checked_outputs(found: Any, architecture: str) -> Outputs:
    """Return what a network returned, if it is one tensor or a list of them.

    Raises:
        UnsupportedModelError: if it is anything else.
    """
    if isinstance(found, list) and found and all(isinstance(each, Tensor) for each in found):
        return found
    if isinstance(found, Tensor):
        return found
    raise UnsupportedModelError(
        f"{architecture} returns a {type(found).__name__} and not one tensor of logits or a list of feature "
        "maps; switch its auxiliary or distillation outputs off (set_distilled_training(False)), or leave "
        "feature_cls out"
    )


def each_tensor(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the output, or to each feature map."""
    return tree_map_only(Tensor, change, outputs)


def as_list(outputs: Outputs) -> list[Tensor]:
    """Return the tensors that a network returned as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@torch.no_grad()
def output_channels(network: nn.Module, spec: ModelSpec) -> tuple[int, ...]:
    """Run a network, and return the number of channels of each tensor that it returns.

    Args:
        network: the network, in eval mode.
        spec: description of the model that it is, or a level of.
    """
    outputs = network(synthetic_input(spec.input_size).to(next(network.parameters()).device))
    return tuple(each.shape[_channel_dim(each, spec.channels_last)] for each in as_list(outputs))


def channel_means(outputs: Outputs, channels_last: bool) -> list[list[float]]:
    """Return the means over the positions of the first image, (channels,) for each tensor.

    Args:
        outputs: logits or an embedding (B, C), whose values are returned; tokens (B, N, C); or feature maps.
        channels_last: whether feature maps are (B, H, W, C) and not (B, C, H, W).
    """
    found = []
    for each in as_list(outputs):
        channels = each.movedim(_channel_dim(each, channels_last), 1)[0]
        found.append((channels.flatten(1).mean(1) if channels.ndim > 1 else channels).tolist())
    return found


def _channel_dim(output: Tensor, channels_last: bool) -> int:
    return output.ndim - 1 if channels_last or output.ndim < 4 else 1
