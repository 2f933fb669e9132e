"""Mixing pairs of training images and their targets: mixup and cutmix."""

from collections.abc import Callable
from typing import Any

from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from nestify.recipe.augment_options import AugmentOptions


def make_mixup(
    augment: AugmentOptions, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Return a function that mixes images (B, C, H, W) and class indices (B,), or None if mixing is off.

    The function returns the mixed images and soft targets (B, classes).
    """
    if not (augment.mixup or augment.cutmix):
        return None
    mix: Callable[[Tensor, Tensor], Any] = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )

    def mix_batch(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) % 2:  # timm mixes pairs of images, but the loss needs soft targets in any case
            return images, mixup_target(target, num_classes, smoothing=augment.smoothing)
        mixed: tuple[Tensor, Tensor] = mix(images, target)
        return mixed

    return mix_batch
