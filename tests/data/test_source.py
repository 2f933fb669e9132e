"""Finding and opening images: every way in which they can be missing or wrong."""

import importlib.util
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from nestify.data import source
from nestify.data.dataset import open_images, open_splits
from nestify.data.loaders import eval_loader
from nestify.errors import DataError, RecipeError
from tests.data.builders import PREPROCESSING, make_folder, make_tar

COUNTS = {"cat": 3, "dog": 2}


@pytest.mark.parametrize("split", ["train", "training"])
@pytest.mark.parametrize("held", ["train", "training", "train.tar", "training.tar"])
def test_train_split_by_any_synonym(tmp_path: Path, held: str, split: str) -> None:
    (make_tar if held.endswith(".tar") else make_folder)(tmp_path / held, COUNTS)
    make_folder(tmp_path / "val", {"cat": 1, "dog": 1})
    images = open_images(str(tmp_path), split)
    assert len(images) == 5
    assert images.class_names == ("cat", "dog")


@pytest.mark.parametrize("held", ["validation", "val", "valid", "eval", "evaluation", "val.tar", "valid.tar"])
def test_validation_split_by_any_synonym(tmp_path: Path, held: str) -> None:
    (make_tar if held.endswith(".tar") else make_folder)(tmp_path / held, COUNTS)
    make_folder(tmp_path / "train", {"cat": 1, "dog": 1})
    assert len(open_images(str(tmp_path), "validation")) == 5


def test_named_splits(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", COUNTS)
    make_tar(tmp_path / "test.tar", {"cat": 1, "dog": 1})
    assert len(open_images(str(tmp_path), "test")) == 2
    assert len(open_images(str(tmp_path), "test.tar")) == 2
    train, validation = open_splits(str(tmp_path), validation_split="test")
    assert (len(train), len(validation)) == (5, 2)


def test_folder_without_splits_is_taken_whole(tmp_path: Path) -> None:
    assert len(open_images(str(make_folder(tmp_path, COUNTS)), "validation")) == 5


def test_dot_is_the_folder_itself(tmp_path: Path) -> None:
    make_folder(tmp_path, {"bus": 2, "train": 3})  # vehicles, not a split
    assert len(open_images(str(tmp_path), ".")) == 5


def test_classes_are_in_natural_order(tmp_path: Path) -> None:
    images = open_images(str(make_folder(tmp_path, {"10": 1, "9": 1, "1": 1})))
    assert images.class_names == ("1", "9", "10")


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file or folder; --data takes"):
        open_images(str(tmp_path / "nowhere"))


def test_missing_split_lists_what_is_there(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", COUNTS)
    make_folder(tmp_path / "test", COUNTS)
    with pytest.raises(
        DataError, match=r"no split 'validation'; it holds test/, train/; .*--val-split.*--holdout"
    ):
        open_images(str(tmp_path), "validation")
    with pytest.raises(DataError, match="no split 'vall'"):
        open_images(str(tmp_path), "vall")


def test_unknown_split_of_a_folder_without_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'second'; it holds cat/, dog/"):
        open_images(str(make_folder(tmp_path, COUNTS)), "second")


def test_missing_train_split_names_its_option(tmp_path: Path) -> None:
    make_folder(tmp_path / "val", COUNTS)
    with pytest.raises(DataError, match=r"no split 'train'; it holds val/; .*--train-split"):
        open_images(str(tmp_path), "train")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images in class folders; it holds nothing"):
        open_images(str(tmp_path))


def test_other_files_only(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no images in class folders; it holds \.heic 1"):
        open_images(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("a.zip", "unpack its archives"), ("b.tar.gz", "unpack its archives"), ("shard-0.tar", "--data wds/")],
)
def test_archives_in_a_folder_name_the_remedy(name: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"no images in class folders; it holds .*{remedy}"):
        open_images(str(tmp_path))


def test_images_without_class_folders(tmp_path: Path) -> None:
    make_folder(tmp_path, {".": 3})
    with pytest.raises(DataError, match="images are outside class folders"):
        open_images(str(tmp_path))
    with pytest.raises(DataError, match="images are outside class folders"):
        open_images(str(make_tar(tmp_path / "flat.tar", {".": 3})))


def test_stray_image_beside_class_folders(tmp_path: Path) -> None:
    make_folder(tmp_path, {**COUNTS, ".": 1})
    with pytest.raises(DataError, match="images are outside class folders"):
        open_images(str(tmp_path))


def test_one_class(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only one class, 'cat'"):
        open_images(str(make_folder(tmp_path, {"cat": 3})))


def test_class_folder_without_images(tmp_path: Path) -> None:
    make_folder(tmp_path, COUNTS)
    (tmp_path / "cow").mkdir()
    with pytest.raises(DataError, match=r"cow: no images in this class folder; it holds nothing"):
        open_images(str(tmp_path))
    (tmp_path / "cow" / "1.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"cow: no images in this class folder; it holds \.heic 1"):
        open_images(str(tmp_path))


def test_nested_class_folders(tmp_path: Path) -> None:
    make_folder(tmp_path / "pets", COUNTS)
    (tmp_path / ".cache").mkdir()
    assert open_images(str(tmp_path)).class_names == ("cat", "dog")


def test_not_a_tar(tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    for content in (b"", b"not a tar" * 200):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train\.tar: not a plain tar archive"):
            open_images(str(path))


def test_compressed_tar(tmp_path: Path) -> None:
    make_folder(tmp_path / "d", COUNTS)
    with tarfile.open(tmp_path / "d.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "d", "d")
    with pytest.raises(DataError, match=r"not a plain tar archive .* so unpack or repack it"):
        open_images(str(tmp_path / "d.tar.gz"))


def test_tar_of_another_name(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "d.tar", COUNTS).rename(tmp_path / "d.images")
    with pytest.raises(DataError, match=r"d\.images: the name .* ends in \.tar"):
        open_images(str(path))


@pytest.mark.parametrize("keep", [512 * 3, 512 * 3 + 100, 512 * 4])
def test_truncated_tar(tmp_path: Path, keep: int) -> None:
    path = make_tar(tmp_path / "train.tar", COUNTS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"train\.tar: the archive is truncated"):
        open_images(str(path))


def test_tar_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"empty\.tar: no images in class folders"):
        open_images(str(make_tar(tmp_path / "empty.tar", {})))


def test_same_images_for_training_and_validation(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "photos", COUNTS)
    tar = make_tar(tmp_path / "photos.tar", COUNTS)
    for data in (folder, tar):
        with pytest.raises(
            DataError, match=r"training and validation would use the same images; .*--holdout"
        ):
            open_splits(str(data))


def test_linked_splits_are_the_same_images(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", COUNTS)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    with pytest.raises(DataError, match="would use the same images"):
        open_splits(str(tmp_path))


def test_validation_inside_training(tmp_path: Path) -> None:
    make_folder(tmp_path, COUNTS)
    make_folder(tmp_path / "val", COUNTS)
    with pytest.raises(DataError, match="would use the same images"):
        open_splits(str(tmp_path), train_split=".")


def test_nothing_is_written_beside_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.getsize", lambda path: 11 * 2**30)  # from 10 GiB on, timm keeps an index
    make_tar(tmp_path / "train.tar", COUNTS)
    make_folder(tmp_path / "val", COUNTS)
    before = sorted(tmp_path.rglob("*"))
    for images in open_splits(str(tmp_path)):
        list(eval_loader(images, PREPROCESSING, batch_size=2))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("data", "package"),
    [
        ("hfds/cifar10", "datasets"),
        ("hfids/cifar10", "datasets"),
        ("wds/shards", "webdataset"),
        ("tfds/mnist", "tensorflow"),
    ],
)
def test_missing_package(monkeypatch: pytest.MonkeyPatch, data: str, package: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=f"needs the package {package}; pip install {package}"):
        open_images(data, "train")


def test_folder_with_the_name_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "webdataset").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(DataError, match="needs the package webdataset"):
        open_images("wds/webdataset", "train")


def test_errors_of_other_packages_become_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'a/b' on the Hub\nand so on")

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: importlib.util.spec_from_loader(name, None, origin="x")
    )
    monkeypatch.setattr(source, "create_dataset", offline)
    with pytest.raises(DataError) as told:
        open_images("hfds/a/b", "train")
    assert str(told.value) == (
        "hfds/a/b (split 'train'): Couldn't reach 'a/b' on the Hub; check the name, the split "
        "(--train-split, --val-split) and the network"
    )


def test_embedded_name(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"embedded/letters: no such images; nestify comes with embedded/digits"
    ):
        open_images("embedded/letters")


def test_options_that_have_no_meaning(tmp_path: Path) -> None:
    make_folder(tmp_path, COUNTS)
    with pytest.raises(RecipeError, match="--data-root x has no meaning"):
        open_images(str(tmp_path), data_root="x")
    with pytest.raises(RecipeError, match="needs the folder that holds it: --data-root"):
        open_images("torch/mnist")
    with pytest.raises(RecipeError, match="give the folder itself"):
        open_images("torch/image_folder", data_root=str(tmp_path))


def test_torchvision_set_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"torch/mnist .*not found.*; download it, .*--data-root"):
        open_images("torch/mnist", data_root=str(tmp_path))
    with pytest.raises(DataError, match=r"torch/nonesuch .*Unknown torchvision dataset"):
        open_images("torch/nonesuch", data_root=str(tmp_path))
    with pytest.raises(DataError, match="torch/mnist: no split 'trian'"):
        open_images("torch/mnist", "trian", data_root=str(tmp_path))


@pytest.fixture
def mnist(tmp_path: Path) -> str:
    """Files as torchvision keeps MNIST: 20 training and 10 test images; image i is all i, a digit i % 10."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, n in (("train", 20), ("t10k", 10)):
        pixels = np.repeat(np.arange(n, dtype=np.uint8), 28 * 28)
        labels = np.arange(n, dtype=np.uint8) % 10
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 0x803, n, 28, 28) + pixels.tobytes()
        )
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, n) + labels.tobytes())
    return str(tmp_path)


def test_torchvision_set(mnist: str) -> None:
    train, validation = open_splits("torch/mnist", data_root=mnist)
    assert (len(train), len(validation), train.num_classes) == (20, 10, 10)
    (images, targets), *_ = eval_loader(train, {**PREPROCESSING, "input_size": (3, 28, 28)}, batch_size=20)
    assert images.shape == (20, 3, 28, 28)  # grey images, as the model wants them
    np.testing.assert_allclose(images[:, 2, 5, 5] * 255, np.arange(20), rtol=1e-6)
    assert targets.tolist() == [*range(10)] * 2
    assert len(train.at_most(10)) == 10
    with pytest.raises(DataError, match="would use the same images"):
        open_splits("torch/mnist", train_split="test", data_root=mnist)


def test_unreadable_split_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    make_folder(tmp_path, COUNTS)
    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(DataError, match=r"cannot be read: .*Permission denied"):
        open_images(str(tmp_path))


def test_removed_folder_after_opening(tmp_path: Path) -> None:
    images = open_images(str(make_folder(tmp_path / "d", COUNTS)))
    shutil.rmtree(tmp_path / "d")
    with pytest.raises(DataError, match=r"000\.png: not a readable image .*No such file"):
        list(eval_loader(images, PREPROCESSING, batch_size=2))
