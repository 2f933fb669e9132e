"""The projection of a level: in which tensors it differs from the network, and where they come from."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from nestify.model.nested_model import NestedModel


@dataclass(frozen=True)
class SharedPart:
    """A level's part of a shared tensor.

    Attributes:
        weight: the part before it is masked; differentiable.
        entry: its entry levels, if the level masks some of it; otherwise None.
        is_cut: whether the level lacks channels of the tensor.
    """

    weight: Tensor
    entry: Tensor | None
    is_cut: bool = False


def shared_parts(nested: "NestedModel", level: int) -> dict[str, SharedPart]:
    """Return the shared tensors of a level's projection by state-dict name.

    For a level that is not smaller than the network, these are the weights that it masks.

    Args:
        nested: the nested model.
        level: 1-based.
    """
    unmasked = nested.unmasked.for_level(level)
    if nested.level_sizes is None or not nested.is_smaller(level):
        masked = {name: entry for name, entry in nested.entry.items() if name not in unmasked}
        return {name: SharedPart(nested.shared_tensor(name), entry) for name, entry in masked.items()}
    own = nested.own_tensors(level)
    parts: dict[str, SharedPart] = {}
    for name in nested.level_sizes.names(level):
        if name not in own:
            whole = nested.shared_tensor(name)
            weight = nested.cut(level, name, whole)
            has_mask = name in nested.entry and name not in unmasked
            entry = nested.cut(level, name, nested.entry[name]) if has_mask else None
            parts[name] = SharedPart(weight, entry, is_cut=weight is not whole)
    return parts


def own_projection(nested: "NestedModel", level: int) -> dict[str, Tensor]:
    """Return the tensors of a level's projection that the level owns, by state-dict name."""
    if nested.level_sizes is None or not nested.is_smaller(level):
        return nested.own_tensors(level, shared_too=False)
    own = nested.own_tensors(level)
    return {name: own[name] for name in nested.level_sizes.names(level) if name in own}
