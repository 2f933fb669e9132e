"""`eval` after `compress --holdout`: which images are used, and what the output says about them."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from nestify.data.dataset import open_splits
from nestify.file.reader import open_nested_file
from tests.cli.driver import UNTRAINED, Outcome, nestify

HELD_OUT = ("--holdout", "0.25", "--seed", "7")


@pytest.fixture(scope="module")
def flat(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of 20 images per class, and the nested file of 15 of them next to it."""
    folder = tmp_path_factory.mktemp("flat")
    shutil.copytree(digits_folder / "train", folder / "photos")
    words = ("compress", "digits", *UNTRAINED, "--data", folder / "photos", *HELD_OUT)
    done = nestify(*words, "-o", folder / "a.nested.safetensors")
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def photos(flat: Path, tmp_path: Path) -> Path:
    """A copy of the images, in a folder of another name, which tests may change."""
    return Path(shutil.copytree(flat / "photos", tmp_path / "copy"))


def evaluate(flat: Path, data: Path, *words: str) -> dict[str, Any]:
    done = nestify("eval", flat / "a.nested.safetensors", "--data", data, "--json", *words)
    assert done.code == 0, done.err
    document: dict[str, Any] = done.document
    assert {level["images"] for level in document["levels"]} == {document["images"]["count"]}
    return document


def test_the_file_says_how_they_were_held_out(flat: Path) -> None:
    record = open_nested_file(flat / "a.nested.safetensors").manifest.held_out
    assert record is not None
    assert (record.share, record.seed, record.split, record.images) == (0.25, 7, "train", 200)


@pytest.mark.parametrize("data", ["photos", "moved"])
def test_the_held_out_images_are_used(flat: Path, photos: Path, data: str) -> None:
    """Exactly those of the run: accuracy and loss are equal, also in a folder of another name."""
    document = evaluate(flat, flat / "photos" if data == "photos" else photos)
    assert document["images"]["used"] == "held-out"
    assert document["images"]["count"] == 50
    assert document["images"]["total"] == 200
    assert document["images"]["trained"] is False
    assert document["images"]["held_out"]["share"] == 0.25
    assert document["images"]["held_out"]["seed"] == 7
    stored = open_nested_file(flat / "a.nested.safetensors").manifest.levels
    for found, level in zip(document["levels"], stored, strict=True):
        assert found["top1"] == pytest.approx(level.metrics.top1)
        assert found["loss"] == pytest.approx(level.metrics.loss, rel=1e-4)


def test_the_table_says_so(flat: Path) -> None:
    done = nestify("eval", flat / "a.nested.safetensors", "--data", flat / "photos")
    assert "Images: 50 of the 200 images" in done.out
    assert "--holdout 0.25, seed 7" in done.out
    assert "--all-images" in done.out


@pytest.mark.parametrize("words", [["--all-images"], ["--split", "train"]])
def test_all_images_on_request(flat: Path, words: list[str]) -> None:
    images = evaluate(flat, flat / "photos", *words)["images"]
    assert (images["used"], images["count"], images["trained"]) == ("all", 200, True)
    done = nestify("eval", flat / "a.nested.safetensors", "--data", flat / "photos", *words)
    assert "all 200 images" in done.out
    assert "trained on" in done.out


def test_a_limit_chooses_among_the_held_out_images(flat: Path) -> None:
    images = evaluate(flat, flat / "photos", "--max-images", "20")["images"]
    assert (images["used"], images["count"]) == ("held-out", 20)


def _remove(folder: Path) -> None:
    next(iter(sorted((folder / "3").iterdir()))).unlink()


def _rename(folder: Path) -> None:
    first = next(iter(sorted((folder / "3").iterdir())))
    first.rename(first.with_name("renamed.png"))


def _move(folder: Path) -> None:
    first = next(iter(sorted((folder / "3").iterdir())))
    first.rename(folder / "4" / first.name.replace(".png", "-3.png"))


@pytest.mark.parametrize(
    "change", [_rename, *(pytest.param(change, marks=pytest.mark.long) for change in (_remove, _move))]
)
def test_a_folder_that_has_changed(flat: Path, photos: Path, change: Any) -> None:
    change(photos)
    images = evaluate(flat, photos)["images"]
    assert (images["used"], images["changed"], images["trained"]) == ("all", True, None)
    assert images["held_out"]["images"] == 200

    def says(done: Outcome, text: str) -> None:
        assert "may have been trained on some of them" in text
        assert "the 200 images" in text

    words = ("eval", flat / "a.nested.safetensors", "--data", photos)
    says(done := nestify(*words), done.out)
    says(done := nestify(*words, "--json"), done.err)


def test_a_validation_split_of_its_own_is_used_completely(flat: Path, digits_folder: Path) -> None:
    images = evaluate(flat, digits_folder)["images"]
    assert (images["used"], images["count"], images["changed"]) == ("all", 80, False)
    assert images["source"].endswith("validation")


def test_a_folder_with_a_training_split_only(flat: Path, tmp_path: Path) -> None:
    shutil.copytree(flat / "photos", tmp_path / "data" / "train")
    images = evaluate(flat, tmp_path / "data")["images"]
    assert (images["used"], images["count"]) == ("held-out", 50)


def test_training_images_are_not_among_the_held_out_ones(flat: Path) -> None:
    """Also if images for temperatures and a limit are set aside."""
    photos = str(flat / "photos")
    training, validation = open_splits(photos, holdout=0.25, max_images=100, seed=7)
    assert not set(training.inner_names()) & set(validation.inner_names())
    words = (*UNTRAINED, "--calibrate", "0.1", "--epochs", "0", *HELD_OUT, "-o", "b.nested.safetensors")
    assert nestify("compress", "digits", "--data", photos, *words).code == 0
    done = nestify("eval", "b.nested.safetensors", "--data", photos, "--json")
    assert done.document["images"]["count"] == len(validation)


def test_a_file_with_a_validation_split_has_no_record(digits_file: Path) -> None:
    assert b'"held_out"' not in digits_file.read_bytes()


def test_slices_keep_the_record(flat: Path, tmp_path: Path) -> None:
    words = ("slice", flat / "a.nested.safetensors", "--level", "1", "-o", tmp_path / "s.nested.safetensors")
    assert nestify(*words).code == 0
    done = nestify("eval", tmp_path / "s.nested.safetensors", "--data", flat / "photos", "--json")
    assert done.document["images"]["used"] == "held-out"
