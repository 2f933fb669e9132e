"""Pixels of image files: formats, more than 8 bits, EXIF orientation, and no other programs."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import EpsImagePlugin, Image
from torchvision.transforms.functional import pil_to_tensor

from nestify.data.dataset import open_images
from nestify.data.loaders import eval_loader, train_loader
from nestify.data.pixels import no_ghostscript, open_image, read_image
from nestify.data.samples import Prepare
from nestify.errors import DataError
from tests.data.builders import NO_CHANGE, PREPROCESSING, make_folder, make_tar

RAMP = np.arange(256, dtype=np.float64).reshape(16, 16) / 255
"""All values of 8 bits, as shares of white."""


def read(data: bytes, mode: str = "L", *, upright: bool = True) -> NDArray[Any]:
    return np.asarray(read_image(io.BytesIO(data), mode, upright=upright))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def sixteen_bits(share: NDArray[Any]) -> Image.Image:
    return Image.fromarray(np.rint(share * 65535).astype(np.uint16))


def pgm(largest: int) -> bytes:
    return b"P5 16 16 %d\n" % largest + np.rint(RAMP * largest).astype(">u2").tobytes()


def tiff(pixels: NDArray[Any], bits: int, photometric: int, sample_format: int, order: str = "<") -> bytes:
    """An uncompressed grey TIFF, written by hand."""
    height, width = pixels.shape
    data = pixels.tobytes()
    entries = [
        (256, 3, width),
        (257, 3, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, height),
        (279, 4, len(data)),
        (339, 3, sample_format),
    ]

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, "little" if order == "<" else "big")

    directory = number(len(entries), 2)
    for tag, kind, value in entries:
        size = 2 if kind == 3 else 4
        directory += number(tag, 2) + number(kind, 2) + number(1, 4) + number(value, size).ljust(4, b"\0")
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + number(8 + len(data), 4) + data + directory + number(0, 4)


def raw16(order: str) -> NDArray[Any]:
    return np.rint(RAMP * 65535).astype(f"{order}u2")


DEEP: dict[str, Callable[[], bytes]] = {
    "I;16 png": lambda: saved(sixteen_bits(RAMP), "PNG"),
    "I;16 tiff": lambda: saved(sixteen_bits(RAMP), "TIFF"),
    "I;16 jpeg 2000": lambda: saved(sixteen_bits(RAMP), "JPEG2000", irreversible=False),
    "I;16 tiff by hand": lambda: tiff(raw16("<"), 16, 1, 1),
    "I;16B tiff": lambda: tiff(raw16(">"), 16, 1, 1, ">"),
    "white is zero": lambda: tiff(65535 - raw16("<"), 16, 0, 1),
    "I pgm": lambda: pgm(65535),
    "I pgm of 10 bits": lambda: pgm(1023),
    "F tiff": lambda: saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "F tiff, big end first": lambda: tiff(RAMP.astype(">f4"), 32, 1, 3, ">"),
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_more_than_8_bits_are_scaled(kind: str, mode: str) -> None:
    pixels = read(DEEP[kind](), mode).reshape(16, 16, -1)
    expected = np.repeat(np.arange(256).reshape(16, 16, 1), pixels.shape[2], axis=2)
    np.testing.assert_array_equal(pixels, expected)


def test_12_bits() -> None:
    values = np.arange(4096).reshape(64, 64)
    even, odd = values[:, ::2], values[:, 1::2]
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=2).astype(np.uint8)
    data = tiff(packed.reshape(64, 96), 12, 1, 1)
    data = data.replace((256).to_bytes(2, "little") + b"\3\0\1\0\0\0\x60", b"\0\1\3\0\1\0\0\0\x40")
    np.testing.assert_array_equal(read(data), np.rint(values * 255 / 4095))


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bits_of_colour(channels: int) -> None:
    """Pillow keeps the high byte of every channel."""
    cv2_free = np.repeat(np.rint(RAMP * 65535).astype(">u2")[:, :, None], channels, axis=2)
    rows = b"".join(b"\0" + row.tobytes() for row in cv2_free)
    np.testing.assert_array_equal(read(png16(rows, channels), "RGB")[:, :, 0], np.arange(256).reshape(16, 16))


def png16(rows: bytes, channels: int) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = (16).to_bytes(4) * 2 + bytes([16, {3: 2, 4: 6}[channels], 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


UNKNOWN = {
    "0 to 255": lambda: saved(Image.fromarray((RAMP * 255).astype(np.float32)), "TIFF"),
    "below 0": lambda: saved(Image.fromarray((RAMP - 0.5).astype(np.float32)), "TIFF"),
    "NaN": lambda: saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
    "32 bits": lambda: saved(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"),
    "signed": lambda: tiff(np.full((4, 4), -5, "<i2"), 16, 1, 2),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_range_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    make_folder(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "deep.tif").write_bytes(UNKNOWN[kind]())
    with pytest.raises(DataError, match=r"deep\.tif: .*convert it to 8 or 16 bits"):
        list(eval_loader(open_images(str(tmp_path)), PREPROCESSING, batch_size=3))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "QOI", "PCX"])
def test_formats(tmp_path: Path, kind: str) -> None:
    endings = [e for e, f in Image.registered_extensions().items() if f == kind and e != ".apng"]
    make_folder(tmp_path, {"a": 1, "b": 1})
    data = saved(Image.new("RGB", (8, 8), (9, 9, 9)), kind, **({"lossless": True} if kind == "WEBP" else {}))
    for ending in endings:
        (tmp_path / "b" / f"x{ending.upper()}").write_bytes(data)
    images = open_images(str(tmp_path))
    assert len(images) == 2 + len(endings)
    (batch, _), *_ = eval_loader(images, PREPROCESSING, batch_size=99)
    assert [round(float(image[1, 0, 0]) * 255) for image in batch[2:]] == [9] * len(endings)
    assert images.notices == ()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_of_several_images(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (c, c, c)) for c in (50, 200)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert (read(data) == 50).all()


CORNERS = np.array([[10, 60, 110], [160, 210, 250]], np.uint8)
# by orientation, how the stored pixels come from the upright ones; from the standard's rows and columns
STORED: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.T,
    6: lambda p: p.T[::-1],
    7: lambda p: p.T[::-1, ::-1],
    8: lambda p: p.T[:, ::-1],
}


def turned(orientation: int, kind: str, pixels: NDArray[Any] = CORNERS) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](pixels)))
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return saved(stored, kind, exif=exif, **lossless)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_orientation(kind: str, orientation: int) -> None:
    np.testing.assert_array_equal(read(turned(orientation, kind)), CORNERS)
    if kind != "TIFF":  # Pillow itself turns TIFF
        stored = read(turned(orientation, kind), upright=False)
        np.testing.assert_array_equal(stored, STORED[orientation](CORNERS))


def test_orientation_of_a_jpeg_and_of_16_bits() -> None:
    halves = np.repeat(np.array([[0], [255]], np.uint8), 8, axis=0).repeat(16, axis=1)
    assert (np.abs(read(turned(6, "JPEG", halves)).astype(int) - halves) < 5).all()
    deep = turned(8, "PNG", CORNERS.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read(deep), CORNERS)


def test_damaged_exif_data() -> None:
    image = Image.fromarray(CORNERS)
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9):
        np.testing.assert_array_equal(read(saved(image, "PNG", exif=exif)), CORNERS)


@pytest.mark.parametrize("make", [make_folder, make_tar])
@pytest.mark.parametrize("upright", [True, False])
def test_training_and_evaluation_turn_alike(
    tmp_path: Path, make: Any, upright: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = np.zeros((8, 8), np.uint8)
    stored[0] = 255  # white on top; upright, on the right
    exif = Image.Exif()
    exif[0x0112] = 6
    monkeypatch.setattr(
        "tests.data.builders.png", lambda value: saved(Image.fromarray(stored), "PNG", exif=exif)
    )
    images = open_images(str(make(tmp_path / "d.tar", {"a": 1, "b": 1})))
    preprocessing = {**PREPROCESSING, "exif_orientation": upright}
    loaders = (
        eval_loader(images, preprocessing, batch_size=2),
        train_loader(images, preprocessing, batch_size=2, augment=NO_CHANGE),
    )
    expected = np.rot90(stored, -1) if upright else stored
    for loader in loaders:
        for batch, _ in loader:
            for image in batch:
                np.testing.assert_array_equal(image[0] * 255, expected)


def test_streams_turn_as_well() -> None:
    image = Image.open(io.BytesIO(turned(6, "PNG")))  # as a stream delivers it
    np.testing.assert_array_equal(Prepare("L", True, pil_to_tensor)(image)[0], CORNERS)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_program_is_started_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: started.append(args))
    for wild in (EPS, b"\x04%!PS" + EPS):
        make_folder(tmp_path, {"a": 1, "b": 1})
        (tmp_path / "a" / "000.png").write_bytes(wild)
        with pytest.raises(DataError, match=r"000\.png: not a readable image .*format that nestify opens"):
            list(eval_loader(open_images(str(tmp_path)), PREPROCESSING, batch_size=2))
    with no_ghostscript(), pytest.raises(OSError, match="Ghostscript"):  # what streams open by themselves
        Image.open(io.BytesIO(EPS)).load()
    assert started == []
    assert EpsImagePlugin.gs_binary == "gs"
    with pytest.raises(Exception, match="cannot identify"):
        open_image(io.BytesIO(EPS))
