"""Small data sets made by hand. Image i of class number c is of one grey, `grey(c, i)`."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

PREPROCESSING = {
    "input_size": (3, 8, 8),
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
"""Leaves an image of 8 x 8 pixels as it is, as pixel / 255."""

NO_CHANGE = {"no_aug": True}


def grey(class_number: int, i: int) -> int:
    return class_number * 50 + i


def png(value: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).convert(mode).save(file, "PNG")
    return file.getvalue()


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    """A folder of class folders, with so many images each."""
    for c, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i:03d}.png").write_bytes(png(grey(c, i)))
    return root


def make_tar(path: Path, counts: dict[str, int]) -> Path:
    """A tar of class folders, with so many images each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for c, (name, count) in enumerate(counts.items()):
            for i in range(count):
                data = png(grey(c, i))
                info = tarfile.TarInfo(f"{name}/{i:03d}.png")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path
