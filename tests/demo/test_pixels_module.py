"""The page prepares pictures as timm and Pillow do, which evaluation uses."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import Compose

from tests.demo.node import needs_node, run_node

pytestmark = needs_node

PICTURES = ((97, 61), (61, 97), (300, 200), (224, 224), (40, 30), (33, 500))
"""Widths and heights."""

PLAIN = {"input_size": [3, 64, 64], "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"}
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"interpolation": "bilinear"},
    {"interpolation": "nearest"},
    {"interpolation": "lanczos"},
    {"interpolation": "box"},
    {"interpolation": "hamming"},
    {"crop_pct": 1.0},
    {"crop_mode": "squash", "crop_pct": 0.9},
    {"crop_mode": "border"},
    {"input_size": [3, 48, 80]},
    {"input_size": [3, 48, 80], "crop_mode": "squash"},
    {"input_size": [1, 28, 28]},
)


def picture(width: int, height: int) -> Image.Image:
    """Return a picture with smooth parts, sharp edges and noise."""
    random = np.random.default_rng(width * height)
    rows, cols = np.mgrid[:height, :width]
    waves = 127 + 127 * np.sin(np.stack([rows / 9, cols / 7, (rows + cols) / 5], -1))
    noise = random.integers(0, 256, (height, width, 3))
    mixed = np.where((rows // 16 + cols // 16)[..., None] % 2, waves, noise)
    return Image.fromarray(mixed.astype(np.uint8))


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_the_input_of_a_network(change: dict[str, Any], tmp_path: Path) -> None:
    preprocessing = {**PLAIN, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], **change}
    channels = preprocessing["input_size"][0]
    asked = [
        {
            "width": width,
            "height": height,
            "pixels": base64.b64encode(picture(width, height).convert("RGBA").tobytes()).decode(),
            "preprocessing": preprocessing,
        }
        for width, height in PICTURES
    ]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    lines = run_node("prepare.mjs", "pixels.js", tmp_path / "asked.json")
    mean, std = (
        [sum(preprocessing[key]) / 3] if channels == 1 else preprocessing[key] for key in ("mean", "std")
    )
    size = tuple(preprocessing["input_size"])
    options = {key: preprocessing[key] for key in ("interpolation", "crop_pct", "crop_mode")}
    transform = create_transform(input_size=size, mean=tuple(mean), std=tuple(std), **options)
    for (width, height), line in zip(PICTURES, lines, strict=True):
        image = picture(width, height).convert("L" if channels == 1 else "RGB")
        resize, *others = transform.transforms
        columns, rows = resize(image).size
        # Some versions of Pillow resize columns first where that is faster, and round in between.
        filter = getattr(Image.Resampling, preprocessing["interpolation"].upper())
        if filter != Image.Resampling.NEAREST:
            image = image.resize((columns, height), filter)
        expected = Compose(others)(image.resize((columns, rows), filter))
        found = torch.from_numpy(np.frombuffer(base64.b64decode(line["input"]), np.float32).copy())
        difference = (found.reshape(size) - expected).abs()
        assert float(difference.max()) < 1e-6, (width, height)  # one of 255 shades is 0.017
