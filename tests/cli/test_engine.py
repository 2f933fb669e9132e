"""The engine at the command line: its library, packed exports, and levels that it evaluates and measures."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import nestify.engine
from nestify.engine.library import VARIABLE, load_library
from nestify.errors import RecipeError
from nestify.file.reader import open_nested_file
from nestify.model.spec import synthetic_input
from tests.cli.driver import nestify as run
from tests.engine.conftest import library, library_path

__all__ = ["library", "library_path"]  # fixtures
SHAPE = (3, 32, 32)


@pytest.fixture(autouse=True)
def _engine(library: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_library(library_path: Path) -> None:
    assert run("engine", "--library").out == f"{library_path}\n"
    document = run("engine", "--json").document
    assert document["library"] == str(library_path)
    assert document["isa"] in run("engine").out
    refused = run("engine", "--library", "--json")
    assert (refused.code, refused.out) == (2, "")


def test_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    done = run("engine", "--build")
    assert done.code == 3
    assert "set CXX" in done.message


def test_a_packed_export(digits_file: Path) -> None:
    done = run("export", digits_file, "--level", "1", "--sparse", "-o", "phone.onnx")
    assert (done.code, done.err) == (0, "")
    assert "nestify engine --library" in done.out
    assert "multiplies the zeros" not in done.out
    expected = open_nested_file(digits_file).manifest.levels[0].fingerprint
    found = nestify.engine.open("phone.onnx", threads=1)(synthetic_input(SHAPE).numpy())[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    model = onnx.load("phone.onnx")
    packed = sum(node.op_type == "SparseConv" for node in model.graph.node)
    assert packed > 0
    document = run("export", digits_file, "--level", "1", "--sparse", "--json", "-o", "phone.onnx").document
    assert document["packed_layers"] == packed
    assert document["max_logit_difference"] < 1e-4


@pytest.mark.long
def test_a_packed_export_in_float16(digits_file: Path, tmp_path: Path) -> None:
    single = run("export", digits_file, "--level", "1", "--sparse", "--json", "-o", "one.onnx").document
    words = ["export", digits_file, "--level", "1", "--sparse", "--dtype", "float16", "-o", "two.onnx"]
    half = run(*words, "--json").document
    assert half["bytes"] < single["bytes"]
    assert half["packed_layers"] == single["packed_layers"]
    assert single["max_logit_difference"] < half["max_logit_difference"] < half["tolerance"] == 3e-2
    images = synthetic_input(SHAPE).numpy()
    logits = nestify.engine.open("two.onnx", threads=1)(images)
    opened = nestify.engine.open(digits_file, level=1, threads=1, cache=tmp_path, dtype="float16")
    np.testing.assert_array_equal(opened(images), logits)
    other = nestify.engine.open(digits_file, level=1, threads=1, cache=tmp_path)(images)
    assert (other != logits).any()


def test_refused_types(digits_file: Path) -> None:
    done = run("export", digits_file, "--level", "1", "--format", "onnx", "--dtype", "float16")
    assert done.code == 2
    assert "add --sparse" in done.message
    with pytest.raises(RecipeError, match=r"'int4'.*float16"):
        nestify.engine.open(digits_file, level=1, dtype="int4")
    with pytest.raises(RecipeError, match="leave dtype='float16' out"):
        nestify.engine.open("phone.onnx", dtype="float16")


@pytest.mark.parametrize("format", ["timm", "pt2"])
def test_only_onnx_is_packed(digits_file: Path, format: str) -> None:
    done = run("export", digits_file, "--level", "1", "--sparse", "--format", format)
    assert done.code == 2
    assert "--sparse" in done.message
    assert format in done.message


def test_without_the_library(digits_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_library.cache_clear()
    monkeypatch.setenv(VARIABLE, "/none.so")
    done = run("export", digits_file, "--level", "1", "--sparse", "-o", "phone.onnx")
    load_library.cache_clear()
    assert done.code == 3
    assert "/none.so" in done.message
    assert not Path("phone.onnx").exists()


def test_accuracy_and_latency_of_what_ships(digits_file: Path, tmp_path: Path) -> None:
    data = Path(__file__).parents[2] / "nestify" / "recipes" / "digits" / "validation.tar"
    words = ["eval", digits_file, "--data", data, "--json", "--max-images", "60"]
    ours, torchs = run(*words, "--engine").document, run(*words).document
    for found, expected in zip(ours["levels"], torchs["levels"], strict=True):
        assert found["top1"] == expected["top1"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    cached = sorted((tmp_path / "cache" / "nestify" / "engine" / "models").iterdir())
    models = [path for path in cached if not path.name.endswith(".graph.onnx")]
    assert (len(models), len(cached)) == (3, 4)  # all three from one graph
    times = [path.stat().st_mtime_ns for path in models]
    words = [
        "bench",
        digits_file,
        "--engine",
        "--batch-size",
        "1",
        "--threads",
        "1",
        "--rounds",
        "3",
        "--json",
    ]
    [measurement] = run(*words, "--warmup", "0").document["measurements"]
    assert measurement["runtime"].startswith("engine on onnxruntime ")
    assert [level["level"] for level in measurement["levels"]] == [1, 2, 3]
    assert [path.stat().st_mtime_ns for path in models] == times  # the models of `eval` are used again


def test_the_engine_has_its_own_measurements(digits_file: Path, tmp_path: Path) -> None:
    """`pick --saved` never takes torch's latency for the engine's."""
    file = tmp_path / "digits.nested.safetensors"
    file.write_bytes(digits_file.read_bytes())
    words = ["--batch-size", "1", "--threads", "1", "--rounds", "3", "--warmup", "0", "--save"]
    assert run("bench", file, *words).code == 0
    picked = ["pick", file, "--saved", "--threads", "1", "--max-latency", "1000ms"]
    refused = run(*picked, "--engine")
    assert refused.code == 3
    assert "--engine" in refused.message
    assert run("bench", file, *words, "--engine", "--level", "1").code == 0
    runtimes = [
        m.get("runtime") for m in json.loads(file.with_name("digits.bench.json").read_text())["measurements"]
    ]
    assert runtimes[0] is None
    assert runtimes[1].startswith("engine")
    assert run(*picked, "--engine").code == 0
    assert run(*picked).code == 0


@pytest.mark.parametrize("command", ["eval", "bench", "pick"])
def test_the_engine_is_on_the_cpu(digits_file: Path, command: str) -> None:
    options = {"eval": ["--data", "none"], "pick": ["--max-latency", "1ms"]}.get(command, [])
    done = run(command, digits_file, *options, "--engine", "--device", "cuda")
    assert done.code == 2
    assert "--device cuda" in done.message
