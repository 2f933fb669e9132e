"""Least squares for the weights of one layer of several networks that share them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Equations:
    """The normal equations of one layer in one network, W A = B, per output channel and group.

    For inputs X (c, positions) and desired outputs Z (o, positions), A = X X^T and B = Z X^T; the squared
    error of weights W is tr(W A W^T) - 2 tr(W B^T) + tr(Z Z^T).

    Attributes:
        gram: A, (groups, c, c), for c weights per output channel.
        products: B, (groups, o, c), for o output channels per group.
        places: one index tensor per dimension of the full weight, which broadcast together: the part of the
            full weight that the network has; None if it has all of it.
        mask: bool in the full weight's shape, the weights that the network uses.
        importance: factor of the network's squared error.
    """

    gram: Tensor
    products: Tensor
    places: tuple[Tensor, ...] | None
    mask: Tensor
    importance: float = 1.0

    def right_side(self) -> Tensor:
        """Return B in the full weight's shape, 0 at weights that the network does not use."""
        return self._widen(self.products)

    def multiply(self, weight: Tensor) -> Tensor:
        """Return W A for the part of a full weight that the network uses, in the full weight's shape."""
        used = weight * self.mask
        if self.places is not None:
            used = used[self.places]
        groups, inputs = self.gram.shape[:2]
        return self._widen(used.reshape(groups, -1, inputs) @ self.gram)

    def diagonal(self) -> Tensor:
        """Return the diagonal of A for each weight, in the full weight's shape."""
        diagonal = self.gram.diagonal(dim1=1, dim2=2).unsqueeze(1)  # (groups, 1, c)
        return self._widen(diagonal.expand_as(self.products))

    def error(self, weight: Tensor) -> Tensor:
        """Return the squared error of a full weight, less that of a weight of zeros."""
        used = weight * self.mask
        return (used * (self.multiply(weight) - 2 * self.right_side())).sum()

    def _widen(self, part: Tensor) -> Tensor:
        if self.places is None:
            return part.reshape(self.mask.shape) * self.mask
        full = part.new_zeros(self.mask.shape)
        full[self.places] = part.reshape([max(index.shape) for index in self.places])
        return full * self.mask


ENOUGH = 1e-4
"""Norm of the residual, over that of the start, at which an output channel is solved."""

ROUNDING = 1e-5
"""Norm of the residual, over that of B, that may be rounding error."""


@torch.no_grad()
def solve(
    start: Tensor, free: Tensor, equations: Sequence[Equations], iterations: int, pull: Tensor | None = None
) -> Tensor:
    """Return weights that minimise the sum of the squared errors of several networks.

    A pull p adds sum(p * (W - start)^2): with fewer positions than weights, or inputs that are nearly
    dependent, the weights then stay near their start (Hoerl and Kennard, "Ridge Regression", 1970).

    Conjugate gradients with a diagonal preconditioner (Hestenes and Stiefel, 1952; Saad, "Iterative Methods
    for Sparse Linear Systems", 2003, algorithm 9.1). Each output channel has equations of its own, and so a
    step length of its own. The error never increases, whatever the number of iterations; where the inputs do
    not determine a weight, it stays near its start.

    Args:
        start: the full weight (out, in, *kernel).
        free: bool in its shape, the weights that may change.
        equations: those of each network.
        iterations: largest number of iterations.
        pull: strength of the pull of each weight towards its start, in the shape of `start`; None: none.

    Returns:
        The full weight; weights that are not free are those of `start`.
    """

    diagonal = _total(each.importance * each.diagonal() for each in equations) * free
    right = _total(each.importance * each.right_side() for each in equations) * free
    pull = torch.zeros_like(start) if pull is None else pull * free

    def multiply(weight: Tensor) -> Tensor:
        return _total(each.importance * each.multiply(weight) for each in equations) * free

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))

    weight = start.clone()
    residual = right - multiply(start)
    tiny = torch.finfo(diagonal.dtype).tiny
    scale = torch.where(diagonal > 0, 1 / (diagonal + pull).clamp_min(tiny), 0.0)
    scaled = scale * residual
    step, size = scaled.clone(), dot(residual, scaled)
    enough = torch.maximum(ENOUGH**2 * size, ROUNDING**2 * dot(right, scale * right))
    for _ in range(iterations):
        if not bool((size > enough).any()):
            break
        product = multiply(step) + pull * step
        curvature = dot(step, product)
        length = torch.where((curvature > 0) & (size > enough), size / curvature, 0.0)
        weight += length * step
        residual -= length * product
        scaled = scale * residual
        old, size = size, dot(residual, scaled)
        step = scaled + torch.where(old > 0, size / old, 0.0) * step
    return weight


def _total(parts: Iterable[Tensor]) -> Tensor:
    first, *others = parts
    return sum(others, first)
