"""The learning rate that a training has if its recipe gives none."""

from timm.optim import get_optimizer_info
from torch.optim import Optimizer

from nestify.recipe.options import ADAPTIVE_LR, DEFAULT_LR


def is_adaptive(optimizer: str | Optimizer) -> bool:
    """Return whether the steps of an optimizer hardly depend on the size of the gradient, as with AdamW.

    That is so of optimizers with betas. (RMSprop and a few others are not found.)

    Args:
        optimizer: timm's name of it, or the optimizer itself.
    """
    if isinstance(optimizer, Optimizer):
        return not {"betas", "beta1"}.isdisjoint(optimizer.defaults)
    return bool(get_optimizer_info(optimizer.lower().removeprefix("lookahead_")).has_betas)


def usual_rate(optimizer: str) -> float:
    """Return the learning rate of a training for which a recipe gives none.

    Args:
        optimizer: timm's name of the optimizer.
    """
    return ADAPTIVE_LR if is_adaptive(optimizer) else DEFAULT_LR
