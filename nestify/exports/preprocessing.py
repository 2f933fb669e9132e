"""Resize, crop and normalisation as part of an ONNX model, which then takes decoded pictures."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from nestify.errors import UnsupportedModelError
from nestify.exports.draft import Probe
from nestify.exports.picture_input import picture_options
from nestify.exports.target import ExportFacts
from nestify.model.preprocessing import MODES, evaluation_transform, scaled_sides

RESIZES = {"bilinear": "linear", "bicubic": "cubic"}
"""ONNX's names of the interpolations that it has and timm's models use."""

TOLERANCE = 2e-2
"""Largest difference of a logit, relative to the largest: some pixels are rounded to a neighbouring value."""

PICTURES = ((37, 53), (64, 48), (301, 257))
"""Height and width of the pictures that an export is checked with, relative to none of the model's sizes."""


def prepend_preprocessing(model: Any, facts: ExportFacts, opset: int) -> Any:
    """Return an ONNX model that takes pictures: uint8 (B, height, width, C), upright, of any size.

    Args:
        model: an ONNX model with an input `images`, float32 (B, C, H, W).
        facts: what the export states about itself, with the preprocessing.
        opset: version of ONNX's operators that the model uses.

    Raises:
        UnsupportedModelError: if ONNX has no such interpolation or crop.
    """
    onnx = import_module("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    (channels, height, width) = facts.input_size
    options = picture_options(facts)
    if opset < 18:
        raise UnsupportedModelError(
            f"--with-preprocessing needs opset 18 or newer, not {opset}; leave --opset out"
        )
    constants: list[Any] = []

    def constant(name: str, values: Sequence[float] | Any, dtype: Any) -> str:
        constants.append(onnx.numpy_helper.from_array(np.asarray(values, dtype), f"nestify_{name}"))
        return f"nestify_{name}"

    scaled = scaled_sides(facts.preprocessing)
    nodes = [
        helper.make_node("Shape", ["pictures"], ["nestify_side"], start=1, end=3),
        *_scaled_sides(helper, types, facts, scaled, constant),
        helper.make_node("Transpose", ["pictures"], ["nestify_planes"], perm=[0, 3, 1, 2]),
        # Sizes of all axes, because onnxruntime 1.32 moves the transposition wrongly past a choice of axes.
        helper.make_node("Shape", ["nestify_planes"], ["nestify_first"], end=2),
        helper.make_node("Concat", ["nestify_first", "nestify_sides"], ["nestify_sizes"], axis=0),
        helper.make_node(
            "Resize",
            ["nestify_planes", "", "", "nestify_sizes"],
            ["nestify_resized"],
            mode=RESIZES[options["interpolation"]],
            antialias=1,
            cubic_coeff_a=-0.5,  # Pillow's
        ),
        # Half of what is cut off, rounded to an even number as Python rounds.
        helper.make_node(
            "Sub", ["nestify_sides", constant("crop", [height, width], np.int64)], ["nestify_margins"]
        ),
        helper.make_node("Cast", ["nestify_margins"], ["nestify_margins_float"], to=types.FLOAT),
        helper.make_node(
            "Mul", ["nestify_margins_float", constant("half", [0.5], np.float32)], ["nestify_halves"]
        ),
        helper.make_node("Round", ["nestify_halves"], ["nestify_rounded"]),
        helper.make_node("Cast", ["nestify_rounded"], ["nestify_from"], to=types.INT64),
        helper.make_node("Add", ["nestify_from", "nestify_crop"], ["nestify_to"]),
        helper.make_node(
            "Slice",
            ["nestify_resized", "nestify_from", "nestify_to", constant("axes", [2, 3], np.int64)],
            ["nestify_cropped"],
        ),
        helper.make_node("Cast", ["nestify_cropped"], ["nestify_float"], to=types.FLOAT),
        helper.make_node(
            "Sub",
            ["nestify_float", constant("mean", _planes(options["mean"]), np.float32)],
            ["nestify_centred"],
        ),
        helper.make_node(
            "Div",
            ["nestify_centred", constant("std", _planes(options["std"]), np.float32)],
            ["nestify_images"],
        ),
    ]
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    batch_size: str | int = batch.dim_param or batch.dim_value
    graph = helper.make_graph(
        nodes,
        "preprocessing",
        [helper.make_tensor_value_info("pictures", types.UINT8, [batch_size, "height", "width", channels])],
        [helper.make_tensor_value_info("nestify_images", types.FLOAT, [batch_size, channels, height, width])],
        constants,
    )
    before = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=model.ir_version
    )
    joined = onnx.compose.merge_models(before, model, [("nestify_images", "images")])
    helper.set_model_props(joined, {entry.key: entry.value for entry in model.metadata_props})
    return joined


def _scaled_sides(
    helper: Any, types: Any, facts: ExportFacts, scaled: Sequence[int], constant: Any
) -> list[Any]:
    """Return the nodes that compute `nestify_sides`, the height and width after the resize."""
    target = constant("scaled", scaled, np.int64)
    if facts.preprocessing["crop_mode"] == "squash":
        return [helper.make_node("Identity", [target], ["nestify_sides"])]
    if scaled[0] == scaled[1]:  # the shorter side becomes this, the other one is rounded down
        return [
            helper.make_node("ReduceMin", ["nestify_side"], ["nestify_short"], keepdims=1),
            helper.make_node("Mul", ["nestify_side", target], ["nestify_product"]),
            helper.make_node("Div", ["nestify_product", "nestify_short"], ["nestify_sides"]),
        ]
    return [  # the smallest that covers the target, rounded to the nearest
        helper.make_node("Cast", ["nestify_side"], ["nestify_side_float"], to=types.DOUBLE),
        helper.make_node(
            "Div",
            ["nestify_side_float", constant("scaled_float", scaled, np.float64)],
            ["nestify_ratios"],
        ),
        helper.make_node("ReduceMin", ["nestify_ratios"], ["nestify_ratio"], keepdims=1),
        helper.make_node("Div", ["nestify_side_float", "nestify_ratio"], ["nestify_exact"]),
        helper.make_node("Round", ["nestify_exact"], ["nestify_nearest"]),
        helper.make_node("Cast", ["nestify_nearest"], ["nestify_sides"], to=types.INT64),
    ]


def _planes(values: Sequence[float]) -> Any:
    """Return a value of each channel, in [0, 1], for pixels (B, C, H, W) of 0 to 255."""
    return 255 * np.asarray(values).reshape(1, -1, 1, 1)


def picture_probes(plain: nn.Module, facts: ExportFacts, batch: int | None) -> list[Probe]:
    """Return pictures, uint8 (B, height, width, C), and the level's logits after timm's own preprocessing.

    Args:
        plain: the level, in eval mode on the CPU.
        facts: what the export states about itself.
        batch: number of pictures per call; None for two sizes.
    """
    transform = evaluation_transform(facts.preprocessing)
    mode = MODES[facts.input_size[0]]
    rng = np.random.default_rng(0)
    found = []
    for number, (height, width) in enumerate(PICTURES):
        pictures = [_picture(rng, height, width, mode) for _ in range(batch or 1 + number % 2)]
        images = torch.stack([transform(picture) for picture in pictures])
        pixels = np.stack([np.asarray(picture).reshape(height, width, -1) for picture in pictures])
        with torch.no_grad():
            found.append(Probe(torch.from_numpy(pixels), plain(images)))
    return found


def _picture(rng: np.random.Generator, height: int, width: int, mode: str) -> Image.Image:
    """Return a picture with large and small structures, as a photograph has."""
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, len(mode)), dtype=np.uint8).squeeze()
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-20, 21, smooth.shape, dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
