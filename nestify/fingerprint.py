"""Logit fingerprints: how a reader proves that it rebuilt a level."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestify.model.spec import synthetic_input

TOLERANCE = 1e-2
"""Largest allowed difference of a rebuilt level's logits, relative to the largest; another machine rounds
differently, a wrong level or a damaged weight is off by far more."""

DIGITS = 7  # of a stored logit; float32 has no more

Network = Callable[[Tensor], Tensor]


def fingerprint(network: Network, input_size: tuple[int, int, int]) -> list[float]:
    """Logits of the fixed synthetic input, rounded; (num_classes,).

    Args:
        network: in eval mode, float32 on the CPU.
        input_size: (channels, height, width).
    """
    with torch.no_grad():
        logits = network(synthetic_input(input_size))[0]
    return [float(f"{value:.{DIGITS}g}") for value in logits.tolist()]


def fingerprint_error(network: Network, input_size: tuple[int, int, int], expected: Sequence[float]) -> float:
    """Largest difference of a network's logits from a stored fingerprint, over their largest magnitude.

    Returns:
        a share; infinite where the numbers of classes differ, NaN where a logit is not finite.
    """
    ours = torch.tensor(fingerprint(network, input_size), dtype=torch.float64)
    theirs = torch.tensor(expected, dtype=torch.float64)
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
