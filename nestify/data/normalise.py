"""Normalising images on the device that uses them, from the bytes that workers send."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import MaybeToTensor, transforms
from torch import Tensor


class Normalise:
    """Turns batches of 8-bit pixels into the input of a model, with the arithmetic of timm's transforms.

    Args:
        mean, std: per channel, for pixels in [0, 1].
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean, self.std = mean.view(-1, 1, 1), std.view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 (B, C, H, W) of uint8 (B, H, W, C), on the same device; leave others unchanged."""
        if images.dtype != torch.uint8:
            return images
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.div_(255).sub_(mean).div_(std)


def split_normalisation(transform: Any) -> tuple[Any, Normalise | None]:
    """Take the normalisation off the end of timm's transform.

    Args:
        transform: what timm's `create_transform` returns.

    Returns:
        A transform from a Pillow image to uint8 (H, W, C), and the normalisation. If the given one does not
        end in a normalisation, as with random erasing, which fills in normalised noise: it, and None.
    """
    steps = getattr(transform, "transforms", None)
    if not isinstance(steps, list) or len(steps) < 2:
        return transform, None
    *before, convert, normalise = steps
    if not (isinstance(convert, MaybeToTensor) and isinstance(normalise, transforms.Normalize)):
        return transform, None
    if any(isinstance(step, MaybeToTensor | transforms.ToTensor) for step in before):
        return transform, None
    mean, std = (torch.as_tensor(each, dtype=torch.float32) for each in (normalise.mean, normalise.std))
    return transforms.Compose([*before, to_bytes]), Normalise(mean, std)


def to_bytes(image: Image.Image) -> Tensor:
    """Return the pixels of an image of 8 bits per channel as uint8 (H, W, C)."""
    pixels = np.array(image, np.uint8)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None])
