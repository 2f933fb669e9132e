"""The loss of a training's labels, as timm has it, and the weights of the classes in it."""

from collections.abc import Sequence

import torch
from timm.loss import create_classification_loss
from torch import Tensor, nn

from nestify.recipe.augment_options import AugmentOptions
from nestify.recipe.options import TrainOptions


def label_loss(
    options: TrainOptions,
    augment: AugmentOptions,
    class_counts: Sequence[int] | None = None,
) -> nn.Module:
    """Return the loss of logits (B, classes) and class indices (B,), or targets (B, classes) of mixed images.

    Args:
        options: `loss` and `class_weights`.
        augment: label smoothing, and whether images are mixed.
        class_counts: number of training images of each class; None if the classes have no weights.
    """
    weights = None if class_counts is None else balanced_weights(class_counts)
    if options.loss == "ce" and weights is not None:  # timm has no weights for it; torch has
        smoothing = 0.0 if is_mixed(augment) else augment.smoothing
        return nn.CrossEntropyLoss(weight=weights, label_smoothing=smoothing)
    loss: nn.Module = create_classification_loss(
        options.loss,
        smoothing=augment.smoothing,
        soft_targets=is_mixed(augment),
        class_weight=weights,
    )
    return loss


def multi_label_loss(
    options: TrainOptions,
    augment: AugmentOptions,
    label_counts: Sequence[int] | None = None,
    images: int = 0,
) -> nn.Module:
    """Return the loss of logits (B, labels) and targets (B, labels), 1 for each label of an image, else 0.

    Args:
        options: `loss` and `class_weights`.
        augment: label smoothing.
        label_counts: number of training images with each label; None if labels have no weights.
        images: number of training images.
    """
    weights = None if label_counts is None else positive_weights(label_counts, images)
    loss: nn.Module = create_classification_loss(
        options.loss, multi_label=True, smoothing=augment.smoothing, pos_weight=weights
    )
    return loss


def positive_weights(label_counts: Sequence[int], images: int) -> Tensor:
    """Return the weight of the images with each label by which they count as much as those without it.

    It is images without / images with the label, as torch's BCEWithLogitsLoss suggests; 1 for a label that
    no image has.
    """
    counts = torch.tensor(label_counts, dtype=torch.float64)
    return torch.where(counts > 0, (images - counts) / counts, 1.0).float()


def is_mixed(augment: AugmentOptions) -> bool:
    """Whether images are mixed, so that a target is a distribution over the classes."""
    return bool(augment.mixup or augment.cutmix)


def balanced_weights(class_counts: Sequence[int]) -> Tensor:
    """Return the weight of each class with which all classes count alike: images / (classes * its images).

    Classes without images have the weight 1, and do not count as classes.
    """
    counts = torch.tensor(class_counts, dtype=torch.float64)
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts)
    return torch.where(present, weights, 1.0).float()
