"""Real architectures whose layers are all packed give the logits of the same model on ONNX Runtime alone."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from nestify.engine import plan
from nestify.engine.graph import make_sparse
from nestify.engine.library import Library
from nestify.engine.session import Session
from nestify.exports.onnx import translate
from tests.exports.builders import alive, facts_of

SMALL: dict[str, tuple[int, dict[str, Any]]] = {
    "test_resnet": (65, {}),
    "test_vit": (64, {"img_size": 64}),
}
MORE: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (63, {}),
    "resnext26ts": (65, {}),
    "regnety_002": (65, {}),
    "densenet121": (64, {"block_config": (2, 2, 2, 2)}),
    "vgg11": (64, {}),
    "mobilenetv2_035": (97, {}),
    "mobilenetv3_small_050": (67, {}),
    "tf_efficientnet_lite0": (95, {}),
    "test_efficientnet": (65, {}),
    "efficientnet_b0": (64, {}),
    "mnasnet_050": (64, {}),
    "test_convnext": (64, {}),
    "repvgg_a0": (64, {}),
    "ghostnet_050": (64, {}),
    "mixer_s32_224": (224, {}),
    "swin_tiny_patch4_window7_224": (
        64,
        {
            "img_size": 64,
            "window_size": 4,
            "embed_dim": 16,
            "depths": [2, 2, 1, 1],
            "num_heads": [1, 2, 4, 8],
        },
    ),
    "levit_128s": (
        64,
        {"img_size": 64, "embed_dim": [32, 48, 64], "num_heads": [2, 3, 4], "depth": [1, 1, 1]},
    ),
    "beit_base_patch16_224": (64, {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 2}),
    "deit_tiny_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "inception_v3": (97, {}),
    "hrnet_w18_small": (64, {}),
    "poolformer_s12": (64, {}),
    "test_nfnet": (64, {}),
}


def mask(model: onnx.ModelProto, density: float = 0.25) -> None:
    """Set weights of convolutions and linear layers to 0, as a sparse level has them."""
    rng = np.random.default_rng(0)
    weights = {node.input[1] for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")}
    for tensor in model.graph.initializer:
        if tensor.name in weights and len(tensor.dims) in (2, 4):
            dense = numpy_helper.to_array(tensor)
            kept = (dense * (rng.random(dense.shape) < density) / np.sqrt(density)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(kept, tensor.name))


def check_family(name: str, side: int, kwargs: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(0)
    plain = alive(name, **kwargs)
    model = translate(plain, facts_of(plain, side), None, None)
    mask(model)
    dense = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    choices = make_sparse(model)
    assert sum(choice.is_sparse for choice in choices) > len(choices) / 2, choices
    assert not any("not known" in choice.reason for choice in choices), choices
    onnx.save(model, folder / "sparse.onnx")
    session = Session(folder / "sparse.onnx", 2)
    rng = np.random.default_rng(0)
    for batch in (1, 5):
        images = rng.standard_normal((batch, 3, side, side)).astype(np.float32)
        expected = dense.run(None, {"images": images})[0]
        error = np.abs(session(images) - expected).max() / np.abs(expected).max()
        print(name, batch, error)
        assert error < 1e-4


@pytest.fixture(autouse=True)
def _every_layer(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack layers of every size."""
    monkeypatch.setattr(plan, "LEAST_MACS", 0)
    monkeypatch.setattr(plan, "LEAST_POSITIONS", 1)


@pytest.mark.parametrize("name", SMALL)
def test_small_models(tmp_path: Path, name: str) -> None:
    check_family(name, *SMALL[name], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", MORE)
def test_families(tmp_path: Path, name: str) -> None:
    check_family(name, *MORE[name], tmp_path)
