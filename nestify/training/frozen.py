"""Frozen levels: training leaves their weights unchanged, bit for bit."""

import torch
from torch import Tensor

from nestify.model.nested_model import NestedModel


class FrozenLevels:
    """The shared weights of a nested model that its first levels use, and that training must not change.

    Private tensors need no care: those of a level that is not trained get no gradient.

    Args:
        nested: the nested model; the entry levels of the frozen weights do not change any more.
        count: number of frozen levels, from the core on.
    """

    def __init__(self, nested: NestedModel, count: int) -> None:
        self.count = count
        self._nested = nested
        masks = frozen_masks(nested, count) if count else {}
        self._complete = [name for name, held in masks.items() if held is None]
        self._held = {name: held for name, held in masks.items() if held is not None}
        self._values = {name: nested.shared_tensor(name).detach().clone() for name in self._held}

    def drop_gradients(self) -> None:
        """Drop the gradients of frozen weights, so that they have no part in clipping and momentum.

        An optimizer skips a tensor without a gradient. Where a part of a tensor is frozen, its gradient is 0.
        """
        for name in self._complete:
            self._nested.shared_tensor(name).grad = None
        for name, held in self._held.items():
            gradient = self._nested.shared_tensor(name).grad
            if gradient is not None:
                gradient.masked_fill_(held, 0)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what an optimizer does even where the gradient is 0, such as weight decay."""
        for name, values in self._values.items():
            tensor = self._nested.shared_tensor(name)
            tensor.copy_(torch.where(self._held[name], values, tensor))


def frozen_masks(nested: NestedModel, count: int) -> dict[str, Tensor | None]:
    """Return which elements of each shared tensor the first levels use.

    Args:
        nested: the nested model.
        count: number of levels.

    Returns:
        State-dict name -> bool mask in the tensor's shape, or None if the levels use the complete tensor, as
        they do with tensors that cannot be masked. Private tensors are left out.
    """
    entry = nested.lowest_levels()
    return {
        name: (entry[name] <= count).to(tensor.device) if name in entry else None
        for name, tensor in nested.shared_tensors().items()
        if name not in nested.own_names
    }


def copy_shared(nested: NestedModel) -> dict[str, Tensor]:
    """Return a copy of the shared tensors of a nested model, by state-dict name, for `reset_unfrozen`."""
    return {name: tensor.detach().clone() for name, tensor in nested.shared_tensors().items()}


@torch.no_grad()
def reset_unfrozen(nested: NestedModel, count: int, original: dict[str, Tensor]) -> None:
    """Set the shared weights that the first levels do not use back to their values before the training.

    Args:
        nested: the nested model.
        count: number of levels that keep their weights, from the core on.
        original: the values, as `copy_shared` returned them.
    """
    for name, held in frozen_masks(nested, count).items():
        if held is not None:
            tensor = nested.shared_tensor(name)
            tensor.copy_(torch.where(held, tensor, original[name]))
