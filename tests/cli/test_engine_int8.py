"""Sparse int8 levels that `eval`, `bench` and `pick` measure: those that `export --sparse --int8` writes."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import nestify.engine
from nestify.data.dataset import open_images
from nestify.data.loaders import eval_loader
from nestify.engine.export import cached_target
from nestify.file.reader import open_nested_file
from tests.cli.driver import nestify as run
from tests.engine.conftest import library, library_path

__all__ = ["library", "library_path"]  # fixtures
ON_ENGINE = ("--engine", "--int8")
QUICK = ("--batch-size", "1", "--threads", "1", "--rounds", "3", "--warmup", "0")


@pytest.fixture(autouse=True)
def _engine(library: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.long
def test_accuracy_is_that_of_the_exported_model(quads_file: Path, digits_folder: Path) -> None:
    """The exported model on the same images, in a session of its own, is right as often."""
    data = ("--data", digits_folder, "--calibrate-images", "40")
    [found] = run("eval", quads_file, *data, "--level", "1", *ON_ENGINE, "--json").document["levels"]
    exported = run(
        "export", quads_file, "--level", "1", "--sparse", "--int8", *data, "--max-drop", "100", "-o", "a.onnx"
    )
    assert exported.code == 0, exported.err
    images = open_images(str(digits_folder), "validation")
    preprocessing = open_nested_file(quads_file).manifest.model.preprocessing.model_dump()
    session = nestify.engine.open("a.onnx", threads=1)
    right = np.concatenate(
        [
            session(batch.numpy()).argmax(1) == labels.numpy()
            for batch, labels in eval_loader(images, preprocessing, batch_size=16, workers=0)
        ]
    )
    assert len(right) == found["images"] == 80
    assert found["top1"] == pytest.approx(100 * right.mean())


def test_what_is_measured_is_packed_and_kept(quads_file: Path, digits_folder: Path, tmp_path: Path) -> None:
    words = ("eval", quads_file, "--data", digits_folder, *ON_ENGINE, "--calibrate-images", "20")
    assert run(*words).code == 0
    folder = tmp_path / "cache" / "nestify" / "engine" / "models"
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    packed = [
        sum(not layer["reason"] for layer in session.metadata["nestify_engine"]["layers"])
        for session in (nestify.engine.open(path, threads=1) for path in times)
    ]
    assert sorted(map(bool, packed)) == [False, True]  # the full level stays dense
    assert run(*words).code == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert run(*words[:-1], "10").code == 0  # other ranges, other models
    assert len(list(folder.iterdir())) == 4


@pytest.mark.long
def test_without_labels(quads_file: Path, digits_folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((digits_folder / "train").rglob("*.png"))[::10]):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    words = ("eval", quads_file, "--data", flat, "--unlabelled", *ON_ENGINE, "--json")
    first, full = run(*words).document["levels"]
    assert 50 < first["agreement"] <= 100
    assert 90 < full["agreement"] <= 100  # the full level in int8 with itself in float32
    assert full["cosine"] < 1


@pytest.mark.long
def test_latency_in_int8_is_a_measurement_of_its_own(quads_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "digits.nested.safetensors"
    file.write_bytes(quads_file.read_bytes())
    assert run("bench", file, *QUICK, "--engine", "--save").code == 0
    picked = ("pick", file, "--saved", "--threads", "1", "--max-latency", "1000ms", *ON_ENGINE)
    refused = run(*picked)
    assert refused.code == 3
    assert "--engine --int8" in refused.message
    done = run("bench", file, *QUICK, *ON_ENGINE, "--save")
    assert done.code == 0
    assert "All levels ran in int8" in done.out
    assert "ran dense" not in done.out
    saved = json.loads(file.with_name("digits.bench.json").read_text())["measurements"]
    assert [measurement["dtype"] for measurement in saved] == ["float32", "int8"]
    assert "the top-1 that of float32" in run(*picked).err


@pytest.mark.parametrize("saturates", [True, False])
def test_saturation_is_said_and_a_reduced_range_avoids_it(
    quads_file: Path, digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saturates: bool
) -> None:
    monkeypatch.setattr("nestify.evaluation.evaluate.sums_saturate", lambda: saturates)
    words = (
        "eval",
        quads_file,
        "--data",
        digits_folder,
        "--level",
        "2",
        *ON_ENGINE,
        "--calibrate-images",
        "20",
    )
    assert ("--reduce-range" in run(*words).err) == saturates
    done = run(*words, "--reduce-range")
    assert done.code == 0
    assert "--reduce-range" not in done.err
    largest = [
        max(
            int(np.abs(numpy_helper.to_array(tensor).astype(np.int64)).max())
            for tensor in onnx.load(path).graph.initializer
            if tensor.data_type == onnx.TensorProto.INT8
        )
        for path in sorted((tmp_path / "cache" / "nestify" / "engine" / "models").iterdir())
    ]
    assert sorted(largest) == [64, 127]  # two models, of 7 and of 8 bits


@pytest.mark.long
def test_levels_of_other_patterns_run_dense(digits_file: Path, digits_folder: Path) -> None:
    done = run("bench", digits_file, *QUICK, *ON_ENGINE, "--level", "1", "--data", digits_folder)
    assert done.code == 0, done.err
    assert "pattern 1x4 alone: those of level1 ran dense" in " ".join(done.out.split())


def test_rivals_have_levels_in_int8(quads_file: Path) -> None:
    [match] = run("bench", quads_file, "--rivals", *QUICK, "--json").document["matches"]
    found = {(each["level"], each["runtime"].split()[0], each["dtype"]) for each in match["contenders"]}
    assert (1, "engine", "int8") in found
    assert (2, "engine", "int8") not in found


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("eval", "--data", "x", "--int8"), "add --engine"),
        (("eval", "--data", "x", "--calibrate-images", "9"), "add it"),
        (("eval", "--data", "x", "--reduce-range"), "add it"),
        (("bench", "--int8"), "add --engine"),
        (("bench", "--int8", "--rivals"), "--rivals and --int8 exclude"),
        (("pick", "--max-latency", "1s", "--int8"), "add --engine"),
        (("pick", "--max-latency", "1s", "--int8", "--saved"), "add --engine"),
    ],
)
def test_what_has_no_use_is_refused(quads_file: Path, words: tuple[str, ...], named: str) -> None:
    done = run(words[0], quads_file, *words[1:])
    assert done.code == 2
    assert named in done.message


def test_the_cache_depends_on_what_the_model_is_made_with(quads_file: Path, tmp_path: Path) -> None:
    file = open_nested_file(quads_file)
    paths = {
        cached_target(file, number, made_with, tmp_path).path
        for number in (1, 2)
        for made_with in (["float32"], ["int8", "a"], ["int8", "b"])
    }
    assert len(paths) == 6
