"""Classifiers of levels that predict their own set of classes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nestify.errors import UnsupportedModelError
from nestify.model.spec import ModelSpec, owner, state_tensors


def head_names(network: nn.Module, spec: ModelSpec) -> list[str]:
    """Return the state-dict names of the tensors of a network's classifiers; each has one row per class.

    Raises:
        UnsupportedModelError: if the network has no classifier, or one whose tensors have other shapes.
    """
    shapes = {name: tensor.shape for name, tensor in state_tensors(network).items()}
    heads = tuple(f"{module}." for module in spec.classifier)
    names = [name for name in shapes if name.startswith(heads)] if heads else []
    if not names or any(shapes[name][:1] != (spec.num_classes,) for name in names):
        raise UnsupportedModelError(
            f"the classifier of {spec.architecture} is not a layer with one row per class, so its levels "
            "cannot predict different classes: do without data.hierarchy"
        )
    return names


def resize_rows(tensor: Tensor, classes: int) -> Tensor:
    """Return a classifier's tensor for a number of classes: zeros (classes, ...), or `tensor` if it fits."""
    return tensor if len(tensor) == classes else tensor.new_zeros(classes, *tensor.shape[1:])


@torch.no_grad()
def coarse_rows(tensor: Tensor, parents: Tensor) -> Tensor:
    """Return the initial classifier tensor for coarse classes: each row is the mean of its classes' rows.

    Args:
        tensor: the classifier's tensor, (classes, ...).
        parents: int64 (classes,), the coarse class of each class.

    Returns:
        (coarse classes, ...)
    """
    parents = parents.to(tensor.device)
    sums = tensor.new_zeros(int(parents.max()) + 1, *tensor.shape[1:]).index_add_(0, parents, tensor)
    counts = torch.bincount(parents).to(tensor.dtype)
    return sums / counts.view(-1, *[1] * (tensor.ndim - 1))


def set_classes(plain: nn.Module, names: Sequence[str], classes: int) -> None:
    """Give a plain model a classifier for another number of classes; the caller sets its values.

    This does not use timm's `reset_classifier`, which changes the layers of some models.

    Args:
        plain: a timm model, or a level's network made by torch.export.
        names: state-dict names of the classifier's tensors.
        classes: the new number of classes.
    """
    for name in names:
        module, local = owner(plain, name)
        old = getattr(module, local)
        rows = resize_rows(old.detach(), classes)
        setattr(module, local, nn.Parameter(rows, requires_grad=old.requires_grad))
        for count in ("out_features", "out_channels"):
            if hasattr(module, count):
                setattr(module, count, classes)
    if hasattr(plain, "num_classes"):
        setattr(plain, "num_classes", classes)  # noqa: B010  # mypy types a module's attributes as tensors
