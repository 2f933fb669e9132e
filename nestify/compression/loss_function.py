"""The loss function that the user's own training loop gives, and what is asked of it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from nestify.errors import RecipeError
from nestify.training.task import Criterion

LossFunction = Callable[[Any, Any], "Tensor | Mapping[str, Any]"]
"""A function of what a level returns and the target, which returns the loss: a tensor of one element, or a
mapping that has it as `loss`. A level returns logits (B, classes), an embedding (B, C) or feature maps."""


def checked_criterion(
    loss_fn: LossFunction | Sequence[LossFunction], n_levels: int
) -> Criterion | list[Criterion]:
    """Return the checked loss function, or one for each level.

    Args:
        loss_fn: a function, or one for each level, core first.
        n_levels: number of levels.

    Raises:
        RecipeError: if there are not as many functions as levels.
    """
    if callable(loss_fn):
        return partial(_checked_loss, loss_fn)
    if len(loss_fn) != n_levels:
        raise RecipeError(
            f"loss_fn has {len(loss_fn)} functions for {n_levels} levels; give one function, or one for each "
            "level, core first"
        )
    return [partial(_checked_loss, each) for each in loss_fn]


def _checked_loss(loss_fn: LossFunction, logits: Any, target: Any) -> Tensor:
    """Compute a loss with a function of the user.

    Raises:
        RecipeError: if it does not return one number.
    """
    result = loss_fn(logits, target)
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = (
            f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
        )
        raise RecipeError(
            f"loss_fn returns {found}; return a tensor of one element, or a mapping that has one as 'loss'"
        )
    return loss.squeeze()
