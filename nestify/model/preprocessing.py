"""From a picture to the input of a model: timm's transform for evaluation."""

from collections.abc import Callable, Mapping, Sequence
from math import floor
from typing import Any

from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from nestify.errors import UnsupportedModelError, foreign_code

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode of the pictures, by the number of channels of the model's input."""


def transform_options(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of timm's transforms that training and evaluation share.

    Args:
        preprocessing: timm's data configuration of a model.

    Raises:
        UnsupportedModelError: if the model takes other pictures than grey or RGB.
    """
    channels = preprocessing["input_size"][0]
    if channels not in MODES:
        raise UnsupportedModelError(
            f"the model takes {channels} input channels; images can be read for 1 (grey) or 3 (RGB)"
        )
    return {
        "input_size": tuple(preprocessing["input_size"]),
        "mean": _per_channel(preprocessing["mean"], channels),
        "std": _per_channel(preprocessing["std"], channels),
        "interpolation": preprocessing["interpolation"],
    }


def evaluation_transform(preprocessing: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """Return timm's transform from an upright picture to the model's input (C, H, W).

    Args:
        preprocessing: timm's data configuration of a model.

    Raises:
        UnsupportedModelError: if timm does not accept it, or the model takes other pictures than grey or RGB.
    """
    options = transform_options(preprocessing)
    crop = {key: preprocessing[key] for key in ("crop_pct", "crop_mode")}
    refused = f"timm does not accept the model's preprocessing {dict(preprocessing)}"
    with foreign_code(lambda reason: UnsupportedModelError(f"{refused}: {reason}")):
        transform: Callable[[Image.Image], Tensor] = create_transform(**options, **crop)
        transform(Image.new(MODES[options["input_size"][0]], options["input_size"][:0:-1]))
    return transform


def scaled_sides(preprocessing: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width in pixels that a picture is resized to, before the image is cut out.

    Args:
        preprocessing: timm's data configuration of a model.
    """
    _, height, width = preprocessing["input_size"]
    return floor(height / preprocessing["crop_pct"]), floor(width / preprocessing["crop_pct"])


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return the statistics per channel; a grey model uses the mean of the RGB statistics, as timm does."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
