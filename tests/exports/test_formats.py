"""Real models in every format, loaded again by the stock libraries where nestify cannot be imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

from nestify.exports.target import ExportFormat, Target
from nestify.exports.write import Exported, export_level
from tests.exports.builders import NAMES, facts_of, target_in

Make = Callable[..., nn.Module]

MODELS: dict[str, dict[str, Any]] = {
    "test_vit": {"img_size": 64, "global_pool": "avg"},
    "beit_base_patch16_224": {  # attention with a bias, whose memory layout depends on gradients
        **{"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 1},
    },
}
SLOW: dict[str, dict[str, Any]] = {
    "levit_128s": {  # position biases that it keeps in eval mode
        **{"img_size": 64, "embed_dim": [32, 48, 64], "num_heads": [2, 3, 4], "depth": [1, 1, 1]},
    },
    "coat_tiny": {"img_size": 64, "embed_dims": [32] * 4, "serial_depths": [1] * 4, "parallel_depth": 1},
    "swin_tiny_patch4_window7_224": {
        **{"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": [2, 2, 1, 1]},
        **{"num_heads": [1, 2, 4, 8]},
    },
    "mobilenetv3_small_050": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "test_nfnet": {},
}
SIDE = 64
STOCK = (ExportFormat.timm, ExportFormat.onnx, ExportFormat.pt2)
"""The formats of test_devices.py are the others."""

WITHOUT_NESTIFY = """
import sys
sys.modules["nestify"] = None
import numpy, onnxruntime, timm, torch
for number, line in enumerate(sys.argv[1:]):
    images = numpy.load("images.npy")
    if "onnxruntime" not in line:
        images = torch.from_numpy(images)
    loaded = eval(line)
    with torch.no_grad():
        logits = loaded(images) if isinstance(loaded, torch.nn.Module) else loaded
    numpy.save(f"{number}.npy", numpy.asarray(logits[0] if isinstance(logits, list) else logits.detach()))
"""


def exported(plain: nn.Module, target: Target, **options: Any) -> Exported:
    done = export_level(plain.eval(), facts_of(plain, SIDE), target, **options)
    assert done.path == target.path
    assert 0 <= done.max_difference <= done.tolerance
    return done


def run_onnx(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def assert_same(found: Tensor, plain: nn.Module, images: Tensor, tolerance: float) -> None:
    with torch.no_grad():
        expected = plain(images)
    assert found.shape == expected.shape
    assert float((found.detach() - expected).abs().max()) <= tolerance * float(expected.abs().max())


def in_all_formats(plain: nn.Module, folder: Path) -> dict[ExportFormat, Exported]:
    return {format: exported(plain, target_in(folder, format)) for format in STOCK}


def check_all_formats(plain: nn.Module, done: dict[ExportFormat, Exported]) -> None:
    """Every format gives the plain model's logits for images that the export has not seen."""
    images = torch.randn(5, 3, SIDE, SIDE)
    facts = facts_of(plain, SIDE)
    with torch.no_grad():
        loaded = timm.create_model(
            facts.architecture, **facts.kwargs, checkpoint_path=str(done[ExportFormat.timm].path)
        )
        assert_same(loaded.eval()(images), plain, images, 1e-6)
        program = torch.export.load(done[ExportFormat.pt2].path).module()
        assert_same(program(images), plain, images, 1e-5)
    assert_same(run_onnx(done[ExportFormat.onnx].path, images), plain, images, 1e-4)


@pytest.fixture(scope="module")
def resnet(make_model: Make) -> nn.Module:
    torch.manual_seed(0)
    return make_model("test_resnet")


@pytest.fixture(scope="module")
def stock(resnet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[ExportFormat, Exported]:
    """test_resnet in every stock format."""
    return in_all_formats(resnet, tmp_path_factory.mktemp("stock"))


def test_a_convolutional_model_in_all_formats(resnet: nn.Module, stock: dict[ExportFormat, Exported]) -> None:
    check_all_formats(resnet, stock)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_models_in_all_formats(make_model: Make, tmp_path: Path, name: str) -> None:
    plain = make_model(name, **MODELS[name])
    check_all_formats(plain, in_all_formats(plain, tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("name", SLOW)
def test_more_models_in_all_formats(make_model: Make, tmp_path: Path, name: str) -> None:
    plain = make_model(name, **SLOW[name])
    check_all_formats(plain, in_all_formats(plain, tmp_path))


@pytest.mark.long
def test_the_printed_line_loads_it_without_nestify(make_model: Make, tmp_path: Path) -> None:
    plain = make_model("test_vit", img_size=SIDE, global_pool="avg")
    images = torch.randn(4, 3, SIDE, SIDE)
    folder = Target(tmp_path / "folder", ExportFormat.timm, folder=True)
    targets = (*(target_in(tmp_path, format) for format in STOCK), folder)
    lines = [exported(plain, target).load_line for target in targets]
    np.save(tmp_path / "images.npy", images.numpy())
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_NESTIFY, *lines]
    subprocess.run(command, cwd=tmp_path, check=True, env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    for number, line in enumerate(lines):
        found = torch.from_numpy(np.load(tmp_path / f"{number}.npy"))
        assert found.shape == (4, 10), line
        assert_same(found, plain, images, 1e-4)


def test_the_line_leaves_out_what_timm_does_anyway(make_model: Make, tmp_path: Path) -> None:
    target = target_in(tmp_path, "timm")
    path = repr(str(target.path))
    plain = make_model("test_vit", global_pool="avg", img_size=SIDE)
    assert exported(plain, target).load_line == (
        "timm.create_model('test_vit', num_classes=10, global_pool='avg', img_size=[64, 64], "
        f"checkpoint_path={path}).eval()"
    )
    plain = make_model("test_resnet", num_classes=1000)
    facts = facts_of(plain, SIDE, class_names=None)
    done = export_level(plain.eval(), facts, target)
    assert done.load_line == f"timm.create_model('test_resnet', checkpoint_path={path}).eval()"


def test_tied_tensors_are_under_all_their_names(make_model: Make, tmp_path: Path) -> None:
    """timm loads strictly, so that a name that is left out stops it."""
    plain = make_model("coat_tiny", **SLOW["coat_tiny"])
    tensors = [id(tensor) for tensor in plain.state_dict(keep_vars=True).values()]
    assert len(set(tensors)) < len(tensors)
    done = exported(plain, target_in(tmp_path, "timm"))
    with safe_open(done.path, "pt") as file:
        assert set(file.keys()) == set(plain.state_dict())
        for name, tensor in plain.state_dict().items():
            assert torch.equal(file.get_tensor(name), tensor), name


def test_every_format_holds_the_facts(stock: dict[ExportFormat, Exported]) -> None:
    with safe_open(stock[ExportFormat.timm].path, "pt") as file:
        texts = file.metadata()
    assert texts.pop("format") == "pt"  # without it, other libraries do not know what they read
    check_texts(texts)
    check_texts({prop.key: prop.value for prop in onnx.load(stock[ExportFormat.onnx].path).metadata_props})
    extra = {"nestify.json": ""}
    torch.export.load(stock[ExportFormat.pt2].path, extra_files=extra)
    found = json.loads(extra["nestify.json"])
    assert found["classes"] == NAMES
    assert (found["architecture"], found["level"], found["level_name"]) == ("test_resnet", 2, "laptop")
    assert found["preprocessing"]["input_size"] == [3, SIDE, SIDE]


def check_texts(texts: dict[str, str]) -> None:
    """What a reader of the metadata finds, all of it as text."""
    assert texts["architecture"] == "test_resnet"
    assert (texts["level"], texts["level_name"], texts["num_classes"]) == ("2", "laptop", "10")
    assert json.loads(texts["classes"]) == NAMES
    assert json.loads(texts["kwargs"])["num_classes"] == 10
    preprocessing = json.loads(texts["preprocessing"])
    assert preprocessing["input_size"] == [3, SIDE, SIDE]
    assert preprocessing["mean"] == list(timm.get_pretrained_cfg("test_resnet").mean)
    assert set(preprocessing) == {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
    assert texts["producer"].startswith("nestify ")


def test_onnx_names_its_ends_and_leaves_the_batch_open(
    make_model: Make, stock: dict[ExportFormat, Exported], tmp_path: Path
) -> None:
    done = stock[ExportFormat.onnx]
    model = onnx.load(done.path)
    ends = [(end.name, shape_of(end)) for end in (*model.graph.input, *model.graph.output)]
    assert ends == [("images", ["batch", 3, SIDE, SIDE]), ("logits", ["batch", 10])]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert done.opset == 18
    newer = exported(make_model("test_resnet"), target_in(tmp_path, "onnx"), batch=2, opset=20)
    model = onnx.load(newer.path)
    assert shape_of(model.graph.input[0]) == [2, 3, SIDE, SIDE]
    assert model.opset_import[0].version == newer.opset == 20


def shape_of(end: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in end.type.tensor_type.shape.dim]


@pytest.mark.parametrize("format", [ExportFormat.onnx, ExportFormat.pt2])
def test_no_path_of_this_machine_is_in_it(stock: dict[ExportFormat, Exported], format: ExportFormat) -> None:
    data = stock[format].path.read_bytes()
    for module in (timm, torch):
        assert str(Path(module.__file__ or "").parent).encode() not in data


@pytest.mark.long
def test_a_traced_graph_is_exported_too(make_model: Make, tmp_path: Path) -> None:
    """A narrower level is no timm model, but a graph."""
    timm_model = make_model("test_resnet").eval()
    facts = facts_of(timm_model, SIDE, architecture="no_such_architecture")
    images = torch.randn(2, 3, SIDE, SIDE)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        plain = torch.export.export(timm_model, (images,), dynamic_shapes=({0: batch},)).module()
    for format in ("onnx", "pt2"):
        export_level(plain, facts, target_in(tmp_path, format))
    assert_same(run_onnx(tmp_path / "model.onnx", images), timm_model, images, 1e-4)
    assert_same(torch.export.load(tmp_path / "model.pt2").module()(images), timm_model, images, 1e-5)


def test_the_images_that_it_was_traced_with_are_not_in_it(make_model: Make, tmp_path: Path) -> None:
    facts = facts_of(make_model("test_resnet"), 256)
    plain = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    for format in ("onnx", "pt2"):
        assert export_level(plain.eval(), facts, target_in(tmp_path, format)).bytes < 3 * 256 * 256
