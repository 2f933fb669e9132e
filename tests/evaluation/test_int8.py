"""int8 exports: calibrated on training images, evaluated on the others, kept within the limit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import nestify
from nestify.data.dataset import open_images
from nestify.data.loaders import eval_loader
from nestify.errors import GateFailed, RecipeError
from nestify.evaluation.int8 import export_int8
from nestify.evaluation.quantiser import Kind, Quantised, Quantiser
from nestify.exports.openvino import openvino_core
from nestify.exports.target import ExportFormat
from nestify.exports.write import Exported
from nestify.file.loading import load_level
from nestify.file.reader import open_nested_file
from tests.exports.builders import facts_of

DIGITS = "embedded/digits"
IMAGES = 100
"""Number of images that `exported` was evaluated on."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nested file of two widths, untrained."""
    path = tmp_path_factory.mktemp("digits") / "digits.nested.safetensors"
    nestify.compress(
        "digits",
        {
            "output": str(path),
            "levels": "0.5,1",
            "schedule.kind": "channel",
            "schedule.fit": False,
            "train.epochs": 0,
            "train.recalibrate_batches": 4,
            "data.max_val": 50,
        },
        observer=nestify.Observer(),
    )
    return path


@pytest.fixture(scope="module")
def exported(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The full level in int8, for the stock runtime."""
    output = tmp_path_factory.mktemp("full") / "a.onnx"
    return export_int8(digits, 2, DIGITS, output=output, max_drop=100, max_images=IMAGES)


def predicted(
    path: Path, file: Path, batch: int = 50, max_images: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes that an ONNX model predicts in the stock runtime, and the right ones."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    preprocessing = open_nested_file(file).manifest.model.preprocessing.model_dump()
    found, right = [], []
    chosen = open_images(DIGITS, "validation").at_most(max_images, 0)
    for images, target in eval_loader(chosen, preprocessing, batch_size=batch):
        if len(images) == batch:
            [logits] = session.run(["logits"], {"images": images.numpy()})
            found.append(logits.argmax(1))
            right.append(target.numpy())
    return np.concatenate(found), np.concatenate(right)


def test_the_accuracy_is_that_of_what_was_written(digits: Path, exported: Exported) -> None:
    done = exported
    assert done.int8 is not None
    found, right = predicted(done.path, digits, batch=1, max_images=IMAGES)
    assert done.int8.images == len(right) == IMAGES
    assert done.int8.score == pytest.approx(100 * float((found == right).mean()), abs=1e-6)
    level = nestify.evaluate(digits, DIGITS, level=2, max_images=IMAGES, seed=0)
    assert done.int8.float32_score == pytest.approx(level.levels[0].top1, abs=1e-4)
    assert done.int8.drop <= 100
    assert done.dtype == "int8"


def test_weights_are_signed_per_channel_and_activations_unsigned(digits: Path, exported: Exported) -> None:
    graph = onnx.load(exported.path).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    layers = [node for node in graph.node if node.op_type == "Conv"]
    assert layers
    for node in layers:
        weights, scales = (tensors[name] for name in made[node.input[1]].input[:2])
        assert weights.dtype == np.int8
        assert scales.shape == (len(weights),)
        assert tensors[made[node.input[0]].input[2]].dtype == np.uint8
    level = load_level(open_nested_file(digits), 2)
    assert exported.bytes < 0.5 * sum(parameter.numel() * 4 for parameter in level.parameters())


def test_calibration_does_not_touch_the_images_that_evaluate(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = []
    original = open_images

    def watched(data: str, split: str = "validation", **options: object) -> object:
        splits.append(split)
        return original(data, split, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("nestify.data.validation.open_images", watched)
    few = {"max_images": 50, "calibrate_images": 10}
    export_int8(digits, "1", DIGITS, output=tmp_path / "a.onnx", max_drop=100, **few)  # type: ignore[arg-type]
    assert splits == ["train", "validation"]


def test_a_drop_above_the_limit_keeps_nothing(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def useless(self: Quantiser, layers: list[str]) -> object:
        tried.append(len(layers))
        return Quantised(None, lambda images: torch.zeros(len(images), 10))  # type: ignore[arg-type]

    monkeypatch.setattr(Quantiser, "make", useless)
    few = {"max_images": 50, "calibrate_images": 4}
    with pytest.raises(GateFailed, match=r"--max-drop 0\.5"):
        export_int8(digits, 2, DIGITS, output=tmp_path / "a.onnx", max_drop=0.5, **few)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    assert tried[:3] == [0, 1, 2]
    assert tried[1:] == [2**power for power in range(len(tried) - 1)]


class TwoBranches(nn.Module):
    """Logits that are the sum of two linear layers of the same inputs.

    Both use the same 8-bit inputs. The weights of `exact` are 7-bit numbers themselves. Each channel of
    `rounded` has one large weight, for an input that is always 0, beside which the others become 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.exact, self.rounded = nn.Linear(192, 10, bias=False), nn.Linear(192, 10, bias=False)
        with torch.no_grad():
            self.exact.weight.copy_(torch.randint(-64, 65, (10, 192)) / 64)
            self.exact.weight[:, 1] = 1.0
            self.rounded.weight[:, 0] = 1000.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.flatten(1)
        exact: torch.Tensor = self.exact(pixels)
        return exact + self.rounded(pixels)


def test_the_costliest_layer_comes_first(make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    plain = TwoBranches().eval()
    images = torch.rand(16, 3, 8, 8)
    images[:, 0, 0, 0] = 0
    facts = facts_of(make_model("test_resnet"), 8)
    quantiser = Quantiser(plain, facts, images, tmp_path, Kind(ExportFormat.onnx, reduce_range=True))
    [worst, best] = quantiser.costliest(2)
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    largest = {
        node.name: max(float(np.abs(tensors[name]).max()) for name in node.input if name in tensors)
        for node in graph.node
        if node.name in (worst, best)
    }
    assert largest[worst] == 1000
    assert largest[best] == 1

    # The worst one in float32 leaves the rounding of the inputs, which onnxruntime must not add to.
    with torch.no_grad():
        exact = plain(images)
        assert (quantiser.make([worst]).run(images) - exact).abs().max() < 0.02 * exact.abs().max()
        assert (quantiser.make([best]).run(images) - exact).abs().max() > 0.05 * exact.abs().max()


@pytest.mark.long
@pytest.mark.parametrize("batch", [4])
def test_a_fixed_batch(digits: Path, tmp_path: Path, batch: int) -> None:
    """359 images are no multiple of 4."""
    path = tmp_path / f"{batch}.onnx"
    done = export_int8(digits, 2, DIGITS, output=path, batch=batch, max_drop=100, calibrate_images=10)
    assert done.int8 is not None
    found, right = predicted(path, digits, batch)
    assert done.int8.score == pytest.approx(100 * (found == right).mean(), abs=1.0)


@pytest.mark.long
def test_openvino_runs_the_same_model(digits: Path, exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is an extra")
    output = tmp_path / "a.openvino"
    done = export_int8(digits, 2, DIGITS, "openvino", output, max_drop=100, max_images=IMAGES)
    assert done.int8 is not None
    assert exported.int8 is not None
    assert done.int8.score == pytest.approx(exported.int8.score, abs=1.5)
    assert done.bytes < 2 * exported.bytes


@pytest.mark.long  # the two tests beside it have one of both each
def test_pictures_in_int8_on_openvino(digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is an extra")
    done = export_int8(
        digits,
        2,
        DIGITS,
        "openvino",
        tmp_path / "a.openvino",
        max_drop=100,
        calibrate_images=10,
        with_preprocessing=True,
    )
    compiled = openvino_core().compile_model(done.path / "openvino_model.xml", "CPU")
    assert compiled.input("pictures").element_type.get_type_name() == "u8"
    assert compiled(np.zeros((2, 20, 30, 3), np.uint8))["logits"].shape == (2, 10)


@pytest.mark.long
def test_pictures_in_int8(digits: Path, tmp_path: Path) -> None:
    done = export_int8(
        digits,
        2,
        DIGITS,
        output=tmp_path / "a.onnx",
        max_drop=100,
        calibrate_images=10,
        with_preprocessing=True,
    )
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(uint8)"
    assert done.with_preprocessing


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_drop": -1.0}, "--max-drop -1"),
        ({"max_drop": float("nan")}, "--max-drop nan"),
        ({"calibrate_images": 0}, "--calibrate-images 0"),
        ({"format": "coreml"}, "--int8 applies to --format onnx and openvino, not to coreml; .*--dtype int8"),
        ({"format": "openvino", "sparse": True}, "--sparse applies to --format onnx"),
    ],
)
def test_refused_options(digits: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        export_int8(digits, 1, DIGITS, **options)  # type: ignore[arg-type]
