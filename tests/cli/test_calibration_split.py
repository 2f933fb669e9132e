"""Images of splits with names of their own: `--train-split` names those that int8 is calibrated on."""

import shutil
from pathlib import Path

import pytest

from nestify.data.validation import open_calibration_images
from tests.cli.driver import nestify as run
from tests.engine.conftest import library, library_path

__all__ = ["library", "library_path"]  # fixtures
FEW = ("--calibrate-images", "4", "--max-images", "20")


@pytest.fixture(scope="module")
def named(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits with their training split in `fit` and their validation split in `check`."""
    folder = tmp_path_factory.mktemp("named")
    for split, name in {"train": "fit", "validation": "check"}.items():
        shutil.copytree(digits_folder / split, folder / name)
    return folder


def test_the_images_are_those_of_the_split(named: Path) -> None:
    images = open_calibration_images(str(named), None, 12, split="fit")
    assert str(images.source) == str(named / "fit")
    assert len(images) == 12


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "--level", "2", "--engine", "--int8", "--split", "check", *FEW),
        ("export", "--level", "2", "--int8", "--split", "check", "--max-drop", "100", "-o", "a.onnx", *FEW),
        (
            "bench",
            "--level",
            "2",
            "--engine",
            "--int8",
            "--batch-size",
            "1",
            "--rounds",
            "2",
            "--warmup",
            "0",
        ),
    ],
    ids=lambda words: words[0],
)
def test_commands_take_the_split(
    library: object,
    digits_file: Path,
    named: Path,
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = (words[0], digits_file, "--data", named, *words[1:])
    refused = run(*command)
    assert refused.code == 3
    assert "--train-split" in refused.message
    done = run(*command, "--train-split", "fit")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    "words",
    [("eval", "--data", "photos"), ("export", "--level", "1"), ("bench",), ("bench", "--int8", "--engine")],
    ids=" ".join,
)
def test_without_int8_it_has_no_use(digits_file: Path, words: tuple[str, ...]) -> None:
    done = run(words[0], digits_file, *words[1:], "--train-split", "fit")
    assert done.code == 2
    assert "--train-split has no use" in done.message
