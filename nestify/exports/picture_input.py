"""Resize, crop and normalisation as torch operators, for formats that are made from a traced program."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nestify.errors import UnsupportedModelError
from nestify.exports.target import ExportFacts
from nestify.model.preprocessing import scaled_sides, transform_options


class PictureInput(nn.Module):
    """A level that takes decoded pictures, and resizes, crops and normalises them as timm does with Pillow.

    A resize in one direction is a product with a matrix that has one row per pixel of the cropped image. It
    is computed from the size of the pictures by operators that every runtime has. The pixels are rounded
    after each direction, as Pillow rounds them, which mostly resizes across first, as is done here.

    Args:
        plain: the level: images (B, C, H, W) to logits.
        facts: what the export states about itself, with the preprocessing.

    Raises:
        UnsupportedModelError: if the resize or the crop has another form.
    """

    def __init__(self, plain: nn.Module, facts: ExportFacts) -> None:
        super().__init__()
        options, self._mode = picture_options(facts), facts.preprocessing["crop_mode"]
        self.plain = plain
        self._kernel = KERNELS[options["interpolation"]]
        self._crop = facts.input_size[1:]
        self._scaled = scaled_sides(facts.preprocessing)
        # Buffers of their own, so that a program stores them; for pixels of 0 to 255.
        planes = (255 * torch.tensor(options[name]).reshape(1, -1, 1, 1) for name in ("mean", "std"))
        self.mean, self.std = map(nn.Buffer, planes)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the logits of upright pictures, uint8 (B, height, width, C), of any size."""
        rows, columns = _numbered(pictures[0, :, 0, 0]), _numbered(pictures[0, 0, :, 0])
        height, width = self._sides(rows[-1:], columns[-1:])
        across = self._matrix(columns, width, self._crop[1])
        down = self._matrix(rows, height, self._crop[0])
        pixels = pictures.permute(0, 3, 1, 2).float()
        pixels = _rounded(pixels @ across.transpose(0, 1))
        pixels = _rounded(down @ pixels)
        logits: Tensor = self.plain((pixels - self.mean) / self.std)
        return logits

    def _sides(self, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Return height and width after the resize, each of shape (1,); all numbers are whole."""
        rows, columns = (torch.full_like(height, side) for side in self._scaled)
        if self._mode == "squash":
            return rows, columns
        if self._scaled[0] == self._scaled[1]:  # the shorter side becomes this, the other one is rounded down
            short = torch.minimum(height, width)
            return _quotient(height * rows, short), _quotient(width * rows, short)
        # The smallest that covers the target, rounded to the nearest.
        return (
            torch.maximum(rows, _nearest(height * columns, width)),
            torch.maximum(columns, _nearest(width * rows, height)),
        )

    def _matrix(self, numbers: Tensor, resized: Tensor, cropped: int) -> Tensor:
        """Return the resize of one direction as a matrix (cropped, size of the pictures).

        Args:
            numbers: 1, 2, ... up to the size of the pictures.
            resized: their size after the resize, of shape (1,).
            cropped: number of pixels in the middle that are kept.
        """
        size, margin = numbers[-1:], resized - cropped
        first = _nearest(margin, torch.full_like(margin, 2))
        kept = torch.arange(cropped, device=numbers.device) + first
        # Distances between the centres of pixels, exact, as multiples of 1 / (2 * resized) of a pixel.
        apart = ((2 * numbers - 1) * resized).unsqueeze(0) - ((2 * kept + 1) * size).unsqueeze(1)
        weights = self._kernel(apart.float() / (2 * torch.maximum(size, resized)).float())
        return weights / weights.sum(1, keepdim=True)


def input_name(plain: nn.Module) -> str:
    """Return the name of what a module takes: `pictures`, or `images` that are preprocessed."""
    return "pictures" if isinstance(plain, PictureInput) else "images"


def _numbered(line: Tensor) -> Tensor:
    """Return 1, 2, ... for the pixels of a line. Not all formats have sizes as numbers to compute with."""
    return torch.ones_like(line, dtype=torch.int64).cumsum(0)


def _quotient(number: Tensor, divisor: Tensor | int) -> Tensor:
    return torch.div(number, divisor, rounding_mode="floor")


def _nearest(number: Tensor, divisor: Tensor) -> Tensor:
    """Return the whole number nearest to a quotient; of two, the even one, as Python rounds."""
    doubled = 2 * number + divisor
    nearest = _quotient(doubled, 2 * divisor)
    is_tie = (nearest * 2 * divisor == doubled).long()
    return nearest - nearest % 2 * is_tie


def _rounded(pixels: Tensor) -> Tensor:
    return (pixels + 0.5).floor().clamp(0, 255)


def _linear(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp(min=0)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' kernel with the parameter -0.5, Pillow's: a polynomial up to 1, a second up to 2, then 0."""
    far = distance.abs().clamp(max=2)
    inner = (1.5 * far - 2.5) * far * far + 1
    outer = ((-0.5 * far + 2.5) * far - 4) * far + 2
    return torch.where(far < 1, inner, outer)


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {"bilinear": _linear, "bicubic": _cubic}
"""Weight of a pixel by its distance from the new pixel's centre, in the larger of both kinds of pixels."""


def picture_options(facts: ExportFacts) -> dict[str, Any]:
    """Return the options of timm's transform, if an export can hold such a preprocessing.

    Raises:
        UnsupportedModelError: if the interpolation or the crop mode is another one.
    """
    options, mode = transform_options(facts.preprocessing), facts.preprocessing["crop_mode"]
    found = None
    if options["interpolation"] not in KERNELS:
        found = f"an interpolation {options['interpolation']}"
    elif mode not in ("center", "squash"):
        found = f"the crop mode {mode}"
    if found is not None:
        raise UnsupportedModelError(
            f"{facts.title} is preprocessed with {found}, which --with-preprocessing does not support; "
            "leave it out, and preprocess as the file's metadata says"
        )
    return options
