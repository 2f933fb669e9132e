"""From an image file to upright pixels of 8 bits per channel.

Only the formats listed here are opened. Others may start programs: Pillow runs Ghostscript for an EPS file,
also for one whose name ends in .png.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import EpsImagePlugin, ExifTags, Image

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "JPEG2000", "TIFF", "BMP", "GIF", "PPM", "QOI", "PCX")
"""Pillow's names of the formats that are read: Pillow decodes them without other programs."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation, what makes an image upright."""

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # JPEG opens MPO


@cache
def image_endings() -> frozenset[str]:
    """Return the endings of image files, lower case, such as `.png`."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in FORMATS)


def open_image(file: str | Path | IO[bytes]) -> Image.Image:
    """Open an image and decode its pixels; of an animation or a file of several pages, the first image.

    Raises:
        Exception: if it is damaged, or of another format than `FORMATS`; Pillow raises many kinds.
    """
    with _without_warnings():
        image = Image.open(file, formats=_formats())
        image.load()
        return image


def to_mode(image: Image.Image, mode: str, *, upright: bool) -> Image.Image:
    """Convert an image to the mode of a model's input, 8 bits per channel; transparency is dropped.

    Integers of more than 8 bits are scaled from the range of their type, floating-point numbers from [0, 1].

    Args:
        image: an image in any of Pillow's modes.
        mode: Pillow's mode, `L` or `RGB`.
        upright: whether to apply the EXIF orientation.

    Raises:
        ValueError: if the range of its values is not known.
    """
    with _without_warnings():
        image.load()  # reads orientations that are stored after the pixels; TIFF is turned by Pillow itself
        turn = _TURNS.get(_orientation(image)) if upright else None
        if image.mode == "F" or image.mode.startswith("I"):
            converted = Image.fromarray(_eight_bits(image)).convert(mode)
        else:
            converted = image.convert(mode)
        return converted if turn is None else converted.transpose(turn)


def read_image(file: str | Path | IO[bytes], mode: str, *, upright: bool) -> Image.Image:
    """Read an image file in a model's mode; see `open_image` and `to_mode`."""
    return to_mode(open_image(file), mode, upright=upright)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, upright, if there is none."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # many cameras and programs write damaged EXIF data; the pixels are good
        return 1


def _eight_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Scale one channel of more than 8 bits to 8 bits, (height, width)."""
    tags: Any = getattr(image, "tag_v2", {})
    pixels: NDArray[Any] = np.asarray(image)
    if image.mode == "F":
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # false for NaN as well
            raise ValueError(
                f"floating-point pixels from {pixels.min():g} to {pixels.max():g} instead of [0, 1]; convert "
                "it to 8 or 16 bits"
            )
        scaled = pixels * 255 + 0.5
    else:
        bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
        if image.mode == "I" and image.format not in ("PNG", "PPM"):
            raise ValueError(f"{bits}-bit pixels, whose range is not known; convert it to 8 or 16 bits")
        largest = 2 ** min(bits, 16) - 1
        scaled = (pixels.astype(np.int64) * 255 + largest // 2) // largest
    eight: NDArray[np.uint8] = np.clip(scaled, 0, 255).astype(np.uint8)
    return 255 - eight if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else eight


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence Pillow's warnings: of large images, damaged metadata and dropped transparency."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def no_ghostscript() -> Iterator[None]:
    """Let Pillow start no Ghostscript, where another package opens images."""
    before = EpsImagePlugin.gs_binary
    EpsImagePlugin.gs_binary = False
    try:
        yield
    finally:
        EpsImagePlugin.gs_binary = before
