"""Levels as OpenVINO models, Core ML packages and ExecuTorch programs, run by their own runtimes."""

import ctypes
import gc
import json
import logging
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nestify.errors import NestifyError, OutputError, RecipeError, UnsupportedModelError
from nestify.exports import openvino as openvino_export
from nestify.exports import packages
from nestify.exports.draft import quiet
from nestify.exports.write import export_level
from tests.exports.builders import NAMES, facts_of, target_in

Make = Callable[..., nn.Module]
SIDE = 64
VIT = {"img_size": SIDE, "embed_dim": 48, "depth": 2, "num_heads": 3}
MODELS = {"test_resnet": {}, "vit_tiny_patch16_224": VIT, "test_efficientnet": {}, "test_convnext": {}}


def one_layer() -> nn.Module:
    """Return a model that is traced and converted quickly."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 10)).eval()


def imported(name: str) -> Any:
    """Import an optional package without what it prints and warns of."""
    with quiet():
        return pytest.importorskip(name, reason=f"{name} is an extra")


def expected(plain: nn.Module, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return plain(images).numpy()


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("vit_tiny_patch16_224", "float32", 1e-4),
        pytest.param("test_resnet", "float16", 3e-2, marks=pytest.mark.long),
        *(
            pytest.param(name, "float32", 1e-4, marks=pytest.mark.long)
            for name in ("test_resnet", "test_efficientnet", "test_convnext")
        ),
    ],
)
def test_openvino(make_model: Make, tmp_path: Path, name: str, dtype: str, tolerance: float) -> None:
    openvino = imported("openvino")
    plain = make_model(name, **MODELS[name]).eval()
    done = export_level(plain, facts_of(plain, SIDE), target_in(tmp_path, "openvino"), dtype=dtype)
    assert sorted(path.name for path in done.path.iterdir()) == ["openvino_model.bin", "openvino_model.xml"]
    core = openvino_export.openvino_core()
    model = core.read_model(done.path / "openvino_model.xml")
    assert str(model.input("images").partial_shape) == f"[?,3,{SIDE},{SIDE}]"
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = torch.randn(5, 3, SIDE, SIDE)
    assert off(compiled(images.numpy())["logits"], expected(plain, images)) < tolerance
    facts = {key: model.get_rt_info(["nestify", key]).astype(str) for key in ("level_name", "classes")}
    assert facts["level_name"] == "laptop"
    assert json.loads(facts["classes"]) == NAMES
    assert done.checked_by == f"openvino {openvino.__version__.partition('-')[0]}"
    assert done.bytes == sum(path.stat().st_size for path in done.path.iterdir())


@pytest.mark.long
def test_an_operator_that_openvino_lacks_is_named(make_model: Make, tmp_path: Path) -> None:
    """This model resizes its position embedding in every pass, as its images are smaller than usual."""
    imported("openvino")
    plain = make_model("test_vit", img_size=SIDE).eval()
    root = logging.root
    before = root.level, root.filters[:], root.handlers[:]
    with pytest.raises(UnsupportedModelError, match="_upsample_bicubic2d_aa"):
        export_level(plain, facts_of(plain, SIDE), target_in(tmp_path, "openvino"))
    assert (root.level, root.filters, root.handlers) == before, (
        "OpenVINO leaves its own settings after an error"
    )


@pytest.fixture(scope="module")
def half_of_two(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model in half precision, which takes two images per call."""
    imported("openvino")
    target = target_in(tmp_path_factory.mktemp("half"), "openvino")
    facts = facts_of(make_model("test_resnet"), SIDE)
    return export_level(one_layer(), facts, target, dtype="float16", batch=2).path


def test_half_precision_halves_the_file(half_of_two: Path) -> None:
    weights = sum(parameter.numel() for parameter in one_layer().parameters())
    size = (half_of_two / "openvino_model.bin").stat().st_size
    assert size / weights == pytest.approx(2, abs=0.02)  # bytes


def test_a_batch_of_one_size(half_of_two: Path) -> None:
    model = openvino_export.openvino_core().read_model(half_of_two / "openvino_model.xml")
    assert str(model.input("images").partial_shape) == f"[2,3,{SIDE},{SIDE}]"


class _SignalStack(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/maps is Linux's")
def test_signal_handlers_can_run_afterwards(half_of_two: Path) -> None:
    """The stack that Python's signal handlers run on is still mapped when models are gone, in any order."""
    runners = [openvino_export.run_model(half_of_two / openvino_export.FILE) for _ in range(3)]
    del runners[0], runners[0], runners
    gc.collect()
    stack = _SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    if stack.start is not None:
        ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
        assert any(int(start, 16) <= stack.start < int(end, 16) for start, end in ranges)


@pytest.mark.long  # test_write.py has the same of two other formats
def test_other_weights_are_not_kept(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported("openvino")
    plain, facts = one_layer(), facts_of(make_model("test_resnet"), SIDE)
    other = deepcopy(plain)
    with torch.no_grad():
        other[1].bias.add_(0.01)
    capture = openvino_export.capture
    monkeypatch.setattr(openvino_export, "capture", lambda _, facts, batch: capture(other, facts, batch))
    target = target_in(tmp_path, "openvino")
    with pytest.raises(OutputError, match="logits differ"):
        export_level(plain, facts, target)
    assert list(tmp_path.iterdir()) == []


def coreml_values(path: Path) -> list[np.ndarray]:
    """Return the weights of a package, expanded, as Core ML's tools read them."""
    tools = imported("coremltools")
    with quiet():
        model = tools.models.MLModel(str(path), skip_model_load=True)
        program = tools.optimize.coreml.decompress_weights(model)._mil_program
    return [
        operation.outputs[0].val
        for operation in program.functions["main"].operations
        if operation.op_type.startswith("const") and np.ndim(operation.outputs[0].val) == 2
    ]


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("int8", 8),
        *(  # the next two tests have packages of float16
            pytest.param(dtype, bits, marks=pytest.mark.long)
            for dtype, bits in (("float16", 16), ("float32", 32))
        ),
    ],
)
def test_coreml(make_model: Make, tmp_path: Path, dtype: str, bits: int) -> None:
    """The classifier's weights are found in the package, and its size follows from the type."""
    tools = imported("coremltools")
    plain = make_model("test_resnet").eval()
    done = export_level(
        plain, facts_of(plain, SIDE, sparsity=0.0), target_in(tmp_path, "coreml"), dtype=dtype
    )
    assert done.batch == 1
    wanted = plain.get_submodule("fc").weight.detach().numpy()
    nearest = min(
        float(np.abs(value.astype(np.float32) - wanted).max())
        for value in coreml_values(done.path)
        if value.shape == wanted.shape
    )
    step = {16: 2**-11, 32: 1e-7, 8: 1 / 254}[bits] * float(np.abs(wanted).max())
    assert nearest <= 1.2 * step  # scales are rounded too
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    assert done.bytes > parameters * bits / 8
    assert done.bytes < 1.25 * parameters * bits / 8 + 50_000
    with quiet():
        spec = tools.utils.load_spec(str(done.path))
    assert [entry.name for entry in spec.description.input] == ["images"]
    assert [entry.name for entry in spec.description.output] == ["logits"]
    assert json.loads(spec.description.metadata.userDefined["nestify.classes"]) == NAMES


def test_coreml_stores_zeros_sparse(make_model: Make, tmp_path: Path) -> None:
    imported("coremltools")
    plain, other = one_layer(), make_model("test_resnet")
    with torch.no_grad():
        plain[1].weight.mul_(torch.rand_like(plain[1].weight) < 0.05)
    target = target_in(tmp_path, "coreml")
    size = export_level(plain, facts_of(other, SIDE, sparsity=0.95), target).bytes
    dense = 2 * plain[1].weight.numel()  # bytes, in float16
    assert size < 0.3 * dense  # a bit for each place, and 5 % of the values


def test_other_weights_in_a_package_are_not_kept(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported("coremltools")
    from nestify.exports import coreml

    stored = coreml._stored_weights
    monkeypatch.setattr(coreml.platform, "system", lambda: "Linux")
    monkeypatch.setattr(coreml, "_stored_weights", lambda folder: [value * 1.1 for value in stored(folder)])
    facts = facts_of(make_model("test_resnet"), SIDE)
    with pytest.raises(OutputError, match="weights differ"):
        export_level(one_layer(), facts, target_in(tmp_path, "coreml"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch", [None, 2])
def test_executorch(make_model: Make, tmp_path: Path, batch: int | None) -> None:
    runtime = imported("executorch.runtime")
    model = make_model("test_resnet").eval()
    plain = one_layer() if batch else model
    done = export_level(plain, facts_of(model, SIDE), target_in(tmp_path, "executorch"), batch=batch)
    program = runtime.Runtime.get().load_program(done.path)
    images = torch.randn(batch or 5, 3, SIDE, SIDE)
    found = program.load_method("forward").execute([images])[0].numpy()
    assert off(found, expected(plain, images)) < 1e-4
    assert program.load_method("nestify_level_name").execute([]) == ["laptop"]


@pytest.mark.parametrize(
    ("format", "package"), [("openvino", "openvino"), ("coreml", "coremltools"), ("executorch", "executorch")]
)
def test_a_missing_package_is_one_sentence(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, package: str
) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(packages, "import_module", absent)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    plain = make_model("test_resnet").eval()
    with pytest.raises(RecipeError) as caught:
        export_level(plain, facts_of(plain, SIDE), target_in(tmp_path, format))
    assert f"needs the package {package}; pip install 'nestify[{format}]' (about " in str(caught.value)


@pytest.mark.parametrize(
    ("format", "options", "said"),
    [
        ("onnx", {"dtype": "float16"}, "--dtype float16 applies to packed layers in ONNX; add --sparse"),
        ("pt2", {"dtype": "int8"}, "--dtype int8 is not one of the types of --format pt2"),
        ("openvino", {"dtype": "bfloat16"}, "give float32 or float16"),
        ("coreml", {"opset": 18}, "--opset 18 applies to --format onnx"),
        ("openvino", {"dtype": "int8"}, "give --int8 --data"),
        ("executorch", {"dtype": "int8"}, "give float32"),
        ("coreml", {"pictures": True}, "--with-preprocessing .* coreml: .* no arrays of uint8; .* Vision"),
        ("timm", {"pictures": True}, "timm: .* timm.data.create_transform"),
    ],
)
def test_options_that_do_not_apply(
    make_model: Make, tmp_path: Path, format: str, options: dict[str, Any], said: str
) -> None:
    plain = make_model("test_resnet").eval()
    with pytest.raises(NestifyError, match=said):
        export_level(plain, facts_of(plain, SIDE), target_in(tmp_path, format), **options)
