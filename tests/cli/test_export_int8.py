"""`export --sparse --int8`: calibrated, checked by its accuracy, and kept only then."""

from pathlib import Path

import numpy as np
import onnx
import pytest

import nestify.engine
from nestify.model.spec import synthetic_input
from tests.cli.driver import nestify as run
from tests.engine.conftest import library, library_path

__all__ = ["library", "library_path"]  # fixtures
ONE = ["--level", "1", "--sparse", "--int8"]


@pytest.fixture(autouse=True)
def _engine(library: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_an_int8_export(quads_file: Path) -> None:
    words = [
        "export",
        quads_file,
        *ONE,
        "--data",
        "embedded/digits",
        "--max-images",
        "60",
        "--max-drop",
        "9",
        "--reduce-range",  # dense layers are exact on every processor
        "-o",
        "phone.onnx",
    ]
    done = run(*words, "--json")
    assert (done.code, done.err) == (0, "")
    document = done.document
    accuracy = document["int8"]
    assert accuracy["images"] == 60
    assert accuracy["agreement"] > 90
    assert (accuracy["reduce_range"], accuracy["saturates"]) == (True, False)
    assert accuracy["drop"] == accuracy["float32_top1"] - accuracy["top1"] <= 9
    operators = [node.op_type for node in onnx.load("phone.onnx").graph.node]
    assert operators.count("SparseConvInt8") == document["packed_layers"] > 0
    level = nestify.engine.open("phone.onnx", threads=1)
    assert level.metadata["level"] == 1
    images = synthetic_input((3, 32, 32)).numpy()
    plain = nestify.engine.open(quads_file, level=1, threads=1)
    difference = np.abs(level(images) - plain(images)).max() / np.abs(plain(images)).max()
    assert 0 < difference < 0.2
    assert difference == pytest.approx(document["max_logit_difference"], abs=0.2)


def test_what_it_says(quads_file: Path) -> None:
    words = [
        "--data",
        "embedded/digits",
        "--max-images",
        "20",
        "--max-drop",
        "9",
        "--calibrate-images",
        "10",
        "--batch",
        "8",
    ]
    done = run("export", quads_file, *ONE, *words, "-o", "phone.onnx")
    assert done.code == 0, done.err
    assert "as onnx, opset 18, int8" in done.out
    assert "on 20 images" in done.out
    assert nestify.engine.open("phone.onnx", threads=1).metadata["level_name"] == "level1"


@pytest.mark.long
def test_zeros_are_compared_with_the_full_level_in_int8(quads_file: Path) -> None:
    words = ["--data", "embedded/digits", "--max-images", "20", "--max-drop", "100", "-o", "phone.onnx"]
    done = run("export", quads_file, "--level", "1", "--int8", *words, "--calibrate-images", "10")
    assert done.code == 0
    assert "as large and as slow as the full level in int8; gzip makes" in " ".join(done.out.split())


def test_too_large_a_drop_is_not_kept(quads_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nestify.evaluation import quantiser

    class Wrong:
        """A session whose classes are all wrong by one."""

        def __init__(self, path: Path, threads: int) -> None:
            self._session = nestify.engine.Session(path, threads)

        def __call__(self, images: np.ndarray) -> np.ndarray:
            return np.roll(self._session(images), 1, axis=1)

    monkeypatch.setattr(quantiser, "Session", Wrong)
    words = ["--data", "embedded/digits", "--max-images", "40", "-o", "phone.onnx"]
    done = run("export", quads_file, *ONE, *words, "--max-drop", "2.5")
    assert done.code == 1
    assert "--max-drop 2.5" in done.message
    assert not Path("phone.onnx").exists()


@pytest.mark.long
def test_calibration_uses_training_images(
    quads_file: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them here, and none of those that check."""
    from nestify.evaluation import quantiser

    seen: list[np.ndarray] = []
    quantise = quantiser.quantise_optimised

    def record(path: Path, output: Path, images: np.ndarray, *rest: object) -> None:
        seen.append(images)
        quantise(path, output, images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(quantiser, "quantise_optimised", record)
    words = ["--data", digits_folder, "--calibrate-images", "1000", "--max-drop", "100", "-o", "phone.onnx"]
    assert run("export", quads_file, *ONE, *words).code == 0
    assert [images.shape for images in seen] == [(200, 3, 32, 32)]


@pytest.mark.long
def test_levels_without_packed_layers_are_told(quads_file: Path) -> None:
    words = ["--data", "embedded/digits", "--max-images", "20", "--max-drop", "100", "-o", "phone.onnx"]
    words += ["--calibrate-images", "10"]
    done = run("export", quads_file, "--level", "2", "--sparse", "--int8", *words)
    assert done.code == 0
    assert "--pattern 1x4" in done.out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--int8", "--data", "photos", "--format", "timm"], ["--int8", "timm"]),
        (["--sparse", "--int8"], ["--int8", "--data"]),
        (["--sparse", "--data", "photos"], ["--data", "--int8"]),
        (["--reduce-range"], ["--reduce-range", "--int8"]),
        (["--sparse", "--max-drop", "1"], ["--max-drop", "--int8"]),
        (["--sparse", "--int8", "--data", "photos", "--format", "timm"], ["--sparse", "timm"]),
    ],
)
def test_options_that_do_not_go_together(quads_file: Path, words: list[str], parts: list[str]) -> None:
    done = run("export", quads_file, "--level", "1", *words)
    assert done.code == 2
    assert all(part in done.message for part in parts)


def test_without_images(quads_file: Path) -> None:
    done = run("export", quads_file, *ONE, "--data", "no-such-folder", "-o", "phone.onnx")
    assert done.code == 3
    assert "no-such-folder" in done.message
    assert not Path("phone.onnx").exists()
