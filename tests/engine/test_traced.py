"""Levels that are packed from one cached graph are the same models as those that are traced one by one."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import nestify
import nestify.engine
from nestify.engine import plan
from nestify.engine.export import packed_model
from nestify.engine.library import Library
from nestify.errors import BadFileError
from nestify.exports import onnx as onnx_export
from nestify.file.fingerprint import logit_fingerprint
from nestify.file.reader import NestedFile, open_nested_file
from nestify.file.writer import write_nested_file
from nestify.model.spec import synthetic_input
from tests.file.builders import description
from tests.file.test_loading import LEVELS, nested_model

MODELS = [
    "test_resnet",
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in ("test_vit", "test_convnext", "test_efficientnet")
    ),
]


@pytest.fixture(autouse=True)
def _every_layer(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_every_layer(monkeypatch)


def pack_every_layer(patch: pytest.MonkeyPatch) -> None:
    """Pack layers of every size."""
    patch.setattr(plan, "LEAST_MACS", 0)
    patch.setattr(plan, "LEAST_POSITIONS", 1)


def nested_file(
    folder: Path, architecture: str, dtype: torch.dtype = torch.float32, off: float = 0
) -> NestedFile:
    """A file of three random levels, whose stored logits are wrong by `off`."""
    nested = nested_model(architecture)
    size = nested.spec.input_size
    model = description(LEVELS).model
    preprocessing = model.preprocessing.model_copy(update={"input_size": size})
    facts = {
        "architecture": nested.spec.architecture,
        "kwargs": nested.spec.kwargs,
        "num_classes": nested.spec.num_classes,
        "class_names": None,
        "preprocessing": preprocessing,
    }
    path = folder / "x.nested.safetensors"
    described = description(LEVELS, model=model.model_copy(update=facts))
    write_nested_file(path, nested.nested_state(), described, dtype)
    levels = [
        entry.model_copy(update={"fingerprint": [value * (1 + off) for value in stored_logits(path, number)]})
        for number, entry in enumerate(described.levels, start=1)
    ]
    write_nested_file(path, nested.nested_state(), described.model_copy(update={"levels": levels}), dtype)
    return open_nested_file(path)


def stored_logits(path: Path, level: int) -> list[float]:
    size = open_nested_file(path).manifest.model.preprocessing.input_size
    return logit_fingerprint(nestify.load(path, level=level, check=False), size)


def traced_alone(file: NestedFile, level: int, folder: Path) -> Path:
    """The level's packed model, traced with its own weights."""
    return nestify.engine.export_sparse(file.path, level, folder / f"{level}.onnx").path


@pytest.fixture(scope="module")
def resnet(library: Library, tmp_path_factory: pytest.TempPathFactory) -> tuple[NestedFile, list[Path]]:
    """A file of test_resnet, and its packed levels, each traced with its own weights."""
    folder = tmp_path_factory.mktemp("resnet")
    with pytest.MonkeyPatch.context() as patch:
        pack_every_layer(patch)
        file = nested_file(folder, "test_resnet")
        return file, [traced_alone(file, level, folder) for level in range(1, LEVELS + 1)]


def constants(path: Path) -> list[bytes]:
    """The values of all initializers in their order; the optimiser generates some names."""
    return [numpy_helper.to_array(tensor).tobytes() for tensor in onnx.load(path).graph.initializer]


@pytest.mark.parametrize("architecture", MODELS)
def test_one_graph_serves_all_levels(
    tmp_path: Path,
    architecture: str,
    resnet: tuple[NestedFile, list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if architecture == "test_resnet":
        file, expected = resnet
    else:
        file = nested_file(tmp_path, architecture)
        expected = [traced_alone(file, level, tmp_path) for level in range(1, LEVELS + 1)]
    traces: list[object] = []
    capture = onnx_export.capture
    monkeypatch.setattr(onnx_export, "capture", lambda *given: (traces.append(given), capture(*given))[1])
    images = synthetic_input(file.manifest.model.preprocessing.input_size, 2).numpy()
    for level, other in enumerate(expected, start=1):
        path = packed_model(file, level, tmp_path / "cache")
        assert constants(path) == constants(other)
        logits = nestify.engine.open(path, threads=1)(images)
        np.testing.assert_array_equal(logits, nestify.engine.open(other, threads=1)(images))
        assert onnx.load(path).metadata_props == onnx.load(other).metadata_props
    assert len(traces) == 1
    assert sum(".packed" in tensor.name for tensor in onnx.load(expected[0]).graph.initializer) > 5


@pytest.mark.long
def test_weights_that_are_stored_in_half_precision(tmp_path: Path) -> None:
    file = nested_file(tmp_path, "test_resnet", torch.bfloat16)
    path = packed_model(file, 1, tmp_path / "cache")
    assert constants(path) == constants(traced_alone(file, 1, tmp_path))


@pytest.mark.long
def test_other_machines_round_differently(tmp_path: Path, resnet: tuple[NestedFile, list[Path]]) -> None:
    """Stored logits that are off by more than an export may be are compared by torch on this machine."""
    file = nested_file(tmp_path, "test_resnet", off=3e-3)
    path = packed_model(file, 1, tmp_path / "cache")
    assert constants(path) == constants(resnet[1][0])  # the weights are the same
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    with pytest.raises(BadFileError, match="gives other logits"):
        packed_model(nested_file(wrong, "test_resnet", off=0.1), 1, wrong / "cache")


@pytest.mark.long
def test_a_damaged_graph_is_made_again(tmp_path: Path, resnet: tuple[NestedFile, list[Path]]) -> None:
    file, alone = resnet
    packed_model(file, 1, tmp_path / "cache")
    [graph] = (tmp_path / "cache").glob("*.graph.onnx")
    graph.write_bytes(graph.read_bytes()[:1000])
    path = packed_model(file, 2, tmp_path / "cache")
    assert constants(path) == constants(alone[1])
    assert graph.stat().st_size > 1000
