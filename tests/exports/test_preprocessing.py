"""Exports that take pictures give the logits of timm's own preprocessing and the plain model."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torch import nn

from nestify.errors import UnsupportedModelError
from nestify.exports.draft import quiet
from nestify.exports.openvino import openvino_core
from nestify.exports.picture_input import PictureInput
from nestify.exports.preprocessing import prepend_preprocessing
from nestify.exports.target import ExportFacts
from nestify.exports.write import export_level
from tests.exports.builders import facts_of, target_in

Make = Callable[..., nn.Module]


def picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A picture with smooth and with noisy parts."""
    coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)).astype(
        int
    )
    return Image.fromarray((smooth + rng.integers(-30, 31, smooth.shape)).clip(0, 255).astype(np.uint8))


def pass_through(height: int, width: int, **preprocessing: Any) -> Any:
    """An ONNX model that returns its images, with the preprocessing before it, in onnxruntime."""
    helper, types = onnx.helper, onnx.TensorProto
    shape = ["batch", 3, height, width]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["images"], ["logits"])],
        "same",
        [helper.make_tensor_value_info("images", types.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", types.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    facts = ExportFacts("x", {}, 10, None, preprocessing, 1, "phone", 0.0, {})
    joined = prepend_preprocessing(model, facts, 18)
    onnx.checker.check_model(joined, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        joined.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


CASES = {
    "usual": {"input_size": [3, 64, 64], "crop_pct": 0.875, "crop_mode": "center"},
    "no margin": {"input_size": [3, 48, 48], "crop_pct": 1.0, "crop_mode": "center"},
    "wide": {"input_size": [3, 40, 64], "crop_pct": 0.9, "crop_mode": "center"},
    "squash": {"input_size": [3, 48, 64], "crop_pct": 0.9, "crop_mode": "squash"},
}


def on_onnx(height: int, width: int, **preprocessing: Any) -> Callable[[np.ndarray], np.ndarray]:
    """The preprocessing of ONNX exports: pictures to images."""
    session = pass_through(height, width, **preprocessing)
    return lambda pictures: session.run(None, {"pictures": pictures})[0]


def in_torch(height: int, width: int, **preprocessing: Any) -> Callable[[np.ndarray], np.ndarray]:
    """The preprocessing of the other formats: pictures to images."""
    facts = ExportFacts("x", {}, 10, None, preprocessing, 1, "phone", 0.0, {})
    module = PictureInput(nn.Identity(), facts)
    return lambda pictures: module(torch.from_numpy(pictures)).numpy()


@pytest.mark.parametrize("make", [on_onnx, in_torch])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_timm(case: str, interpolation: str, make: Callable[..., Any]) -> None:
    """A few of 255 steps off at most, because Pillow rounds between the two passes of a resize."""
    preprocessing = {
        **CASES[case],
        **{"interpolation": interpolation, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]},
    }
    _, height, width = preprocessing["input_size"]
    prepare = make(height, width, **preprocessing)
    transform = create_transform(**(preprocessing | {"input_size": tuple(preprocessing["input_size"])}))

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(st.integers(20, 200), st.integers(20, 200))
    def check(rows: int, columns: int) -> None:
        shown = picture(np.random.default_rng([rows, columns]), rows, columns)
        wanted = transform(shown).numpy()
        found = prepare(np.array(shown)[None])[0]
        assert found.shape == wanted.shape
        steps = np.abs(found - wanted) * 255 * np.asarray(preprocessing["std"]).reshape(3, 1, 1)
        assert steps.max() < 6
        assert steps.mean() < 0.35

    check()


def test_logits_are_those_of_the_plain_model(make_model: Make, tmp_path: Path) -> None:
    plain = make_model("test_resnet").eval()
    facts = facts_of(plain, 64)
    done = export_level(plain, facts, target_in(tmp_path, "onnx"), pictures=True)
    assert done.with_preprocessing
    transform = create_transform(**(dict(facts.preprocessing) | {"input_size": (3, 64, 64)}))
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", "height", "width", 3]
    assert session.get_modelmeta().custom_metadata_map["level_name"] == "laptop"
    shown = [picture(np.random.default_rng(seed), 90, 130) for seed in range(3)]
    [found] = session.run(["logits"], {"pictures": np.stack([np.asarray(each) for each in shown])})
    with torch.no_grad():
        wanted = plain(torch.stack([transform(each) for each in shown])).numpy()
    assert np.abs(found - wanted).max() < 2e-2 * np.abs(wanted).max()


def run_pt2(path: Path, pictures: np.ndarray) -> Any:
    return torch.export.load(path).module()(torch.from_numpy(pictures)).detach().numpy()


def run_openvino(path: Path, pictures: np.ndarray) -> Any:
    core = openvino_core()
    model = core.read_model(path / "openvino_model.xml")
    assert model.input("pictures").element_type.get_type_name() == "u8"
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(pictures)["logits"]


def run_executorch(path: Path, pictures: np.ndarray) -> Any:
    method = import_module("executorch.runtime").Runtime.get().load_program(path).load_method("forward")
    return np.concatenate(
        [method.execute([torch.from_numpy(picture[None])])[0].numpy().copy() for picture in pictures]
    )


@pytest.mark.parametrize(
    ("format", "package", "run"),
    [
        pytest.param("pt2", "torch", run_pt2, marks=pytest.mark.long),
        pytest.param("openvino", "openvino", run_openvino, marks=pytest.mark.long),
        ("executorch", "executorch.runtime", run_executorch),
    ],
)
def test_other_formats_take_pictures(
    make_model: Make, tmp_path: Path, format: str, package: str, run: Callable[[Path, np.ndarray], Any]
) -> None:
    with quiet():
        pytest.importorskip(package, reason=f"{package} is an extra")
    plain = make_model("test_resnet").eval()
    facts = facts_of(plain, 64)
    done = export_level(plain, facts, target_in(tmp_path, format), pictures=True)
    assert done.with_preprocessing
    assert "pictures" in done.load_line
    assert done.batch == (1 if format == "executorch" else None)
    transform = create_transform(**(dict(facts.preprocessing) | {"input_size": (3, 64, 64)}))
    shown = [picture(np.random.default_rng(seed), 90, 130) for seed in range(3)]
    found = run(done.path, np.stack([np.asarray(each) for each in shown]))
    with torch.no_grad():
        wanted = plain(torch.stack([transform(each) for each in shown])).numpy()
    assert np.abs(found - wanted).max() < 2e-2 * np.abs(wanted).max()


@pytest.mark.parametrize("make", [on_onnx, in_torch])
@pytest.mark.parametrize(
    ("changes", "said"),
    [({"interpolation": "lanczos"}, "an interpolation lanczos"), ({"crop_mode": "border"}, "mode border")],
)
def test_other_preprocessing_is_refused(changes: dict[str, Any], said: str, make: Callable[..., Any]) -> None:
    preprocessing = {
        **CASES["usual"],
        **{"interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.2] * 3},
        **changes,
    }
    with pytest.raises(UnsupportedModelError, match=said):
        make(64, 64, **preprocessing)
