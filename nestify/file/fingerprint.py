"""Fingerprints: what a level returns for a fixed synthetic input, stored to prove that it was rebuilt."""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from nestify.model.feature_maps import Outputs, channel_means
from nestify.model.spec import synthetic_input

DIGITS = 7  # significant digits of a stored logit; float32 has no more

Network = Callable[[Tensor], Outputs]


def fingerprint_parts(
    network: Network, input_size: tuple[int, int, int], channels_last: bool = False
) -> list[list[float]]:
    """Return the rounded logits (num_classes,) of the fixed synthetic input, in a list.

    For a backbone these are the embedding, or the mean of each channel, for each feature map.

    Args:
        network: network in eval mode, float32 on the CPU.
        input_size: (channels, height, width) in pixels.
        channels_last: whether feature maps are (B, H, W, C) and not (B, C, H, W).
    """
    with torch.no_grad():
        means = channel_means(network(synthetic_input(input_size)), channels_last)
    return [[float(f"{value:.{DIGITS}g}") for value in each] for each in means]


def logit_fingerprint(
    network: Network, input_size: tuple[int, int, int], channels_last: bool = False
) -> list[float]:
    """Return the numbers of `fingerprint_parts` in one list."""
    return list(chain.from_iterable(fingerprint_parts(network, input_size, channels_last)))


def fingerprint_error(
    network: Network,
    input_size: tuple[int, int, int],
    expected: Sequence[float],
    channels_last: bool = False,
) -> float:
    """Compare a network's logits, or the means of its feature maps, with a stored fingerprint.

    Returns:
        The largest difference relative to the largest logit; infinite if the numbers of classes differ, NaN
        if a logit is not finite.
    """
    ours = torch.tensor(logit_fingerprint(network, input_size, channels_last), dtype=torch.float64)
    theirs = torch.tensor(expected, dtype=torch.float64)
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
