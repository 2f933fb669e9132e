"""The walk of a backbone: nested, trained, saved, loaded, verified, sliced and exported, by any schedule.

Every comparison is with timm's own model, or with the plain model of a level.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from torch import Tensor, nn

import nestify
from nestify.errors import RecipeError, UnsupportedModelError
from nestify.file.slicing import slice_file
from tests.family_walk import randomise_constants

TOLERANCE = 1e-5
"""Largest difference of float32 outputs, relative to the largest output."""

EMBEDDING = {"num_classes": 0}
FEATURES = {"features_only": True}

SCHEDULES: dict[str, dict[str, Any]] = {
    "weight": {"schedule": "weight", "levels": [0.8, 0]},
    "channel": {"schedule": "channel", "levels": [0.5, 1]},
    "kept": {"schedule": "channel", "levels": [0.5, 1], "options": {"schedule.keep_outputs": True}},
    "layer": {"schedule": "layer", "levels": [0.5, 1]},
    "combined": {
        "schedule": "combined",
        "options": {"level": [{"width": 0.5, "sparsity": 0.5}, {"width": 1.0}]},
    },
}


@dataclass(frozen=True)
class Made:
    """A backbone that passed the walk by one schedule.

    Attributes:
        path: the nested file.
        channels: channels of the outputs of both levels, core first.
        original: channels of the original's outputs.
    """

    path: Path
    channels: list[tuple[int, ...]]
    original: tuple[int, ...]


def make_backbone(name: str, **kwargs: Any) -> nn.Module:
    """Return timm's backbone in eval mode, without constant tensors, so that every weight matters."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False, **kwargs)
    randomise_constants(model)
    return model.eval()


def as_list(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def walk_backbone(
    name: str, kwargs: dict[str, Any], schedule: str, side: int, folder: Path, *, onnx: bool = True
) -> Made | None:
    """Take a backbone through the walk; None if the schedule does not apply to it.

    Args:
        name: name in timm's registry.
        kwargs: arguments of `timm.create_model`.
        schedule: one of `SCHEDULES`.
        side: side of the images in pixels.
        folder: where files are written.
        onnx: whether to export the core level, which takes most of the time.

    Raises:
        AssertionError: if a check fails.
    """
    model = make_backbone(name, **kwargs)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        original = as_list(model(images))
    try:
        nested = nestify.nest(model, input_size=(3, side, side), **SCHEDULES[schedule])
    except (RecipeError, UnsupportedModelError) as error:
        if "can be skipped" in str(error) or "can be left out" in str(error):
            return None
        raise
    with torch.no_grad():
        assert_same(nested(images), original)
    optimizer = torch.optim.SGD(nested.train().parameters(), lr=1e-3)
    results = nested.backward(images, None, _mean_square)
    optimizer.step()
    assert all(bool(torch.isfinite(result.loss)) for result in results)
    path = nested.eval().save(folder / f"{schedule}.nested.safetensors")
    again = nestify.load(path)
    channels = []
    for level in (1, 2):
        with torch.no_grad():
            expected = as_list(nested(images, level=level))
            assert_same(again(images, level=level), expected)
            assert_same(nestify.load(path, level=level)(images), expected)
        channel_dim = 1 if original[0].ndim == 2 or not again.spec.channels_last else 3
        channels.append(tuple(each.shape[channel_dim] for each in expected))
        assert again.feature_channels(level) == channels[-1]
    assert nestify.verify(path).passed
    core = folder / f"{schedule}.core.safetensors"
    slice_file(path, 1, core)
    if onnx:
        done = nestify.export(core, 1, output=folder / f"{schedule}.onnx")
        with torch.no_grad():
            expected = as_list(nested(images, level=1))
        assert_same(run_onnx(done.path, images), expected, 1e-3)
    return Made(path, channels, tuple(each.shape[channel_dim] for each in original))


def run_onnx(path: Path, images: Tensor) -> list[Tensor]:
    """Run an exported level in ONNX Runtime alone."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(np.asarray(found)) for found in session.run(None, {"images": images.numpy()})]


def assert_same(found: Tensor | list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for ours, theirs in zip(as_list(found), expected, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def _mean_square(outputs: Tensor | list[Tensor], target: object) -> Tensor:
    return torch.stack([each.square().mean() for each in as_list(outputs)]).sum()
