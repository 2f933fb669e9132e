"""What makes a job's result another one, and what does not."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nestify.compression.batch import identity as module
from nestify.compression.batch.identity import Contents, job_identity
from nestify.recipe.recipe import load_recipe


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkpoint, a table of classes, and images as files and as a tar."""
    root = tmp_path / "place"
    for name in ("photos/train/cat/1.png", "photos/train/dog/2.png", "photos/val.tar"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    (root / "a.safetensors").write_bytes(b"weights")
    (root / "classes.csv").write_text("fine,coarse\n")
    (root / "labels.csv").write_text("file,labels\n")
    return root


def hash_of(place: Path, **changes: object) -> str:
    options = {
        "data.path": str(place / "photos"),
        "data.hierarchy": str(place / "classes.csv"),
        "model.checkpoint": str(place / "a.safetensors"),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return job_identity(load_recipe("resnet18", options), Contents())


def test_the_same_contents_elsewhere_are_the_same(place: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(place, tmp_path / "other"))
    for file in other.rglob("*"):
        os.utime(file, (1, 1))
    assert hash_of(other) == hash_of(place)


@pytest.mark.parametrize(
    "changes",
    [
        {"output": "b.safetensors"},
        {"data__workers": 3},
        {"data__on_bad_image": "skip"},
        {"train__log": ["csv"]},
        {"train__checkpoint_minutes": 1.0},
    ],
)
def test_what_makes_no_difference(changes: dict[str, object], place: Path) -> None:
    assert hash_of(place, **changes) == hash_of(place)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__lr": 0.5},
        {"seed": 1},
        {"dtype": "float16"},
        {"gates.min_top1": 50.0},
        {"data__val_split": "test"},
        {"levels": "0.9,0"},
        {"model__checkpoint": None},
        {"data__hierarchy": None},
        {"data__class_names": "nowhere"},
        {"data__exif_orientation": False},
        {"data__path": "hfds/x"},
    ],
)
def test_options_that_make_a_difference(changes: dict[str, object], place: Path) -> None:
    assert hash_of(place, **changes) != hash_of(place)


@pytest.mark.parametrize(
    "change",
    [
        lambda place: (place / "a.safetensors").write_bytes(b"Weights"),
        lambda place: (place / "a.safetensors").unlink(),
        lambda place: (place / "classes.csv").write_text("fine,Coarse\n"),
        lambda place: (place / "photos/train/cat/1.png").write_bytes(b"longer than it was before"),
        lambda place: (place / "photos/train/cat/1.png").rename(place / "photos/train/dog/1.png"),
        lambda place: (place / "photos/train/dog/2.png").unlink(),
        lambda place: (place / "photos/val.tar").write_bytes(b"Photos/val.tar"),
        lambda place: shutil.rmtree(place / "photos"),
    ],
)
def test_contents_that_make_a_difference(change: Callable[[Path], object], place: Path) -> None:
    before = hash_of(place)
    change(place)
    assert hash_of(place) != before


def test_labels_count_by_their_content(place: Path, tmp_path: Path) -> None:
    options = {"data__hierarchy": None, "data__labels": str(place / "labels.csv")}
    before = hash_of(place, **options)
    moved = shutil.copy(place / "labels.csv", tmp_path / "moved.csv")
    assert hash_of(place, **{**options, "data__labels": str(moved)}) == before
    (place / "labels.csv").write_text("file,labels\ncat/1.png,cat\n")
    assert hash_of(place, **options) != before


def test_large_archives_are_known_by_their_size(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL", 14)
    before = hash_of(place)
    (place / "photos/val.tar").write_bytes(b"Photos/val.tar")
    assert hash_of(place) == before
    (place / "photos/val.tar").write_bytes(b"photos/val.tar+")
    assert hash_of(place) != before


def test_the_version_makes_a_difference(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hash_of(place)
    monkeypatch.setattr(module, "__version__", "99")
    assert hash_of(place) != before


def test_a_local_model_is_known_by_its_bytes(place: Path) -> None:
    (place / "local").mkdir()
    (place / "local" / "model.safetensors").write_bytes(b"1")
    recipe = load_recipe(f"local-dir:{place}/local", {"data.path": "hfds/x"})
    before = job_identity(recipe, Contents())
    Path(shutil.move(place / "local", place / "moved"))
    moved = load_recipe(f"local-dir:{place}/moved", {"data.path": "hfds/x"})
    assert job_identity(moved, Contents()) == before
    (place / "moved" / "model.safetensors").write_bytes(b"2")
    assert job_identity(moved, Contents()) != before


def test_a_baseline_is_known_by_its_bytes(place: Path) -> None:
    named = {"gates__baseline": str(place / "base.json"), "gates__max_regression": 1.0}
    (place / "base.json").write_text("1")
    before = hash_of(place, **named)
    assert hash_of(place, **named) == before
    (place / "base.json").write_text("2")
    assert hash_of(place, **named) != before


def test_downloads_into_a_root_make_no_difference(place: Path) -> None:
    named = {"data__path": "torch/cifar10", "data__root": str(place)}
    before = hash_of(place, **named)
    (place / "downloaded").touch()
    assert hash_of(place, **named) == before


def test_links_in_circles_end(place: Path) -> None:
    (place / "photos/train/cat/up").symlink_to(place / "photos")
    assert hash_of(place) == hash_of(place)


def test_each_file_is_read_once(place: Path) -> None:
    contents = Contents()
    before = contents.of_bytes(str(place / "a.safetensors"))
    (place / "a.safetensors").write_bytes(b"others")
    assert contents.of_bytes(str(place / "a.safetensors")) == before


def test_links_to_what_holds_the_images_are_not_followed(place: Path) -> None:
    (place / "photos/train/cat/up").symlink_to(place)
    before = hash_of(place)
    (place / "elsewhere.txt").write_text("not among the images")
    assert hash_of(place) == before
