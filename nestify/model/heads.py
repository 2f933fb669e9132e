"""Classifiers of levels that tell classes of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nestify.errors import UnsupportedModelError
from nestify.model.spec import ModelSpec, owner, state_tensors


def head_names(network: nn.Module, spec: ModelSpec) -> list[str]:
    """State-dict names of the tensors of a network's classifiers, each with one row per class.

    Raises:
        UnsupportedModelError: if it has no such classifier.
    """
    shapes = {name: tensor.shape for name, tensor in state_tensors(network).items()}
    heads = tuple(f"{module}." for module in spec.classifier)
    names = [name for name in shapes if name.startswith(heads)] if heads else []
    if not names or any(shapes[name][:1] != (spec.num_classes,) for name in names):
        raise UnsupportedModelError(
            f"the classifier of {spec.architecture} is no layer of one row per class, so levels cannot have "
            "classes of their own"
        )
    return names


def rows_for(tensor: Tensor, classes: int) -> Tensor:
    """A classifier's tensor for another number of classes: zeros (classes, ...); itself where that fits."""
    return tensor if len(tensor) == classes else tensor.new_zeros(classes, *tensor.shape[1:])


@torch.no_grad()
def coarse_rows(tensor: Tensor, parents: Tensor) -> Tensor:
    """A classifier's tensor for coarser classes, each the mean of its classes' rows: where it starts from.

    Args:
        tensor: (classes, ...). `parents`: int64 (classes,), the coarse class of each.
    """
    parents = parents.to(tensor.device)
    sums = tensor.new_zeros(int(parents.max()) + 1, *tensor.shape[1:]).index_add_(0, parents, tensor)
    counts = torch.bincount(parents).to(tensor.dtype)
    return sums / counts.view(-1, *[1] * (tensor.ndim - 1))


def set_classes(plain: nn.Module, names: Sequence[str], classes: int) -> None:
    """Give a plain model a classifier for another number of classes, its values yet to be filled.

    Not by timm's `reset_classifier`, which leaves some models with other layers than they were built with.

    Args:
        plain: a timm model, or the network that torch.export made of a level.
        names: of the classifier's tensors.
    """
    for name in names:
        module, local = owner(plain, name)
        old = getattr(module, local)
        setattr(module, local, nn.Parameter(rows_for(old.detach(), classes), requires_grad=old.requires_grad))
        for count in ("out_features", "out_channels"):
            if hasattr(module, count):
                setattr(module, count, classes)
    if hasattr(plain, "num_classes"):
        setattr(plain, "num_classes", classes)  # noqa: B010  # a module's attributes are typed as tensors
