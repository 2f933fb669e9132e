"""Sessions from ONNX models: what they need, what they refuse, and what they say."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import nestify.engine
from nestify.engine.graph import make_sparse
from nestify.engine.library import VARIABLE, Library
from nestify.engine.session import Session
from nestify.errors import BadFileError, DataError, RecipeError, SetupError
from tests.engine.test_graph import Builder

ALONE = """
import sys
for name in ("torch", "timm", "onnx", "pydantic", "safetensors", "typer", "rich"):
    sys.modules[name] = None
import numpy, nestify.engine
session = nestify.engine.open(sys.argv[1], threads=1)
numpy.save(sys.argv[2], session(numpy.load(sys.argv[3])))
"""


def save_model(path: Path, images: tuple[int | str, ...] = ("batch", 32, 20, 20)) -> Path:
    """A packed model: ReLU of a sparse 3x3 convolution of 32 channels."""
    net = Builder(images)
    model = net.model(net.node("Relu", net.conv("images")))
    helper.set_model_props(model, {"level_name": "phone", "classes": json.dumps(["cat", "dog"])})
    make_sparse(model)
    onnx.save(model, path)
    return path


@pytest.fixture
def path(library: Library, tmp_path: Path) -> Path:
    return save_model(tmp_path / "phone.onnx")


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 32, 20, 20)).astype(np.float32)


def test_numpy_and_onnxruntime_are_enough(path: Path, library_path: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", images(3))
    command = [sys.executable, "-c", ALONE, path, tmp_path / "logits.npy", tmp_path / "images.npy"]
    environment = {VARIABLE: str(library_path), "PYTHONPATH": ":".join(sys.path)}
    subprocess.run(command, check=True, env=environment)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), Session(path, 1)(images(3)), atol=1e-5)


def test_lists_are_images_too(path: Path) -> None:
    session = Session(path, 1)
    np.testing.assert_array_equal(session(images(2).tolist()), session(images(2)))


def test_several_threads_share_a_session(path: Path) -> None:
    session = Session(path, 2)
    inputs = [image[None] for image in images(4)]
    due = [session(image) for image in inputs]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(session, inputs * 10))
    for logits, wanted in zip(found, due * 10, strict=True):
        np.testing.assert_array_equal(logits, wanted)


def test_one_image_at_a_time_or_many(path: Path) -> None:
    session = nestify.engine.open(path, threads=2)
    together = session(images(5))
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together, np.concatenate([session(one[None]) for one in images(5)]))
    np.testing.assert_array_equal(session(images(2).astype(np.float64)), together[:2])
    np.testing.assert_array_equal(session(images(4)[::2]), together[:4:2])


def test_sessions_do_not_share_threads(path: Path) -> None:
    """Several levels may be open at once, each with its own number of threads."""
    one, two = Session(path, 1), Session(path, 2)
    assert (one.threads, two.threads) == (1, 2)
    np.testing.assert_allclose(one(images(1)), two(images(1)), atol=1e-5)
    assert Session(path).threads >= 1


def test_a_fixed_batch(library: Library, tmp_path: Path) -> None:
    session = Session(save_model(tmp_path / "two.onnx", (2, 32, 20, 20)), 1)
    assert session(images(4)).shape == (4, 32, 20, 20)
    with pytest.raises(DataError, match=r"\(3, 32, 20, 20\).*two\.onnx"):
        session(images(3))


@pytest.mark.parametrize("shape", [(1, 3, 20, 20), (32, 20, 20), (1, 32, 20, 21), (0, 32, 20, 20)])
def test_other_shapes_are_refused(path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="preprocess them"):
        Session(path, 1)(np.zeros(shape, np.float32))


def test_what_a_model_says(path: Path) -> None:
    session = Session(path, 1)
    assert session.input_size == (32, 20, 20)
    assert session.metadata["level_name"] == "phone"
    assert session.metadata["classes"] == ["cat", "dog"]
    assert [layer["operator"] for layer in session.metadata["nestify_engine"]["layers"]] == ["Conv"]


def test_refusals(path: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="level='phone'"):
        nestify.engine.open(path, level="phone")
    with pytest.raises(RecipeError, match="give level"):
        nestify.engine.open(tmp_path / "x.nested.safetensors")
    with pytest.raises(RecipeError, match="threads = 0"):
        Session(path, 0)
    with pytest.raises(BadFileError, match="no such file"):
        Session(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(BadFileError, match=r"text\.onnx.*export it again"):
        Session(tmp_path / "text.onnx", 1)


def test_without_onnxruntime(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SetupError, match="pip install onnxruntime"):
        Session(path, 1)


def test_a_residual_of_another_shape_is_refused(path: Path, tmp_path: Path) -> None:
    """Where a model was changed by hand: adding would read out of bounds."""
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 32, 1, 1), np.float32), "small"))
    model.graph.node[0].input.append("small")
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(DataError, match="residual"):
        Session(tmp_path / "changed.onnx", 1)(images(1))


def test_other_channels_are_refused(path: Path, tmp_path: Path) -> None:
    """Where the model's input was changed by hand, the operator itself refuses."""
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 16
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(DataError, match="channels"):
        Session(tmp_path / "changed.onnx", 1)(np.zeros((1, 16, 20, 20), np.float32))
