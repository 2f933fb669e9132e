"""Fitting classes to a model, holding images out, and taking a part of them."""

import os
from pathlib import Path

import numpy as np
import pytest

from nestify.data.dataset import Images, open_images, open_splits
from nestify.data.loaders import eval_loader
from nestify.errors import DataError, RecipeError
from tests.data.builders import PREPROCESSING, grey, make_folder, make_tar


def labels(images: Images) -> list[int]:
    return [int(t) for _, targets in eval_loader(images, PREPROCESSING, batch_size=3) for t in targets]


def pixels(images: Images) -> list[int]:
    """The grey of each image, which tells the images apart."""
    loader = eval_loader(images, PREPROCESSING, batch_size=3)
    return [round(float(image[0, 0, 0]) * 255) for batch, _ in loader for image in batch]


@pytest.mark.parametrize("make", [make_folder, make_tar])
def test_classes_are_mapped_by_name(tmp_path: Path, make: type[make_folder]) -> None:
    data = str(make(tmp_path / "d.tar", {"ant": 1, "cat": 2, "dog": 1}))
    images = open_images(data, class_names=["dog", "bee", "cat", "ant"])
    assert labels(images) == [3, 2, 2, 0]
    assert images.class_names == ("dog", "bee", "cat", "ant")
    assert images.num_classes == 4


def test_class_unknown_to_the_model(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 1, "dog": 1, "yak": 1})
    with pytest.raises(DataError, match=r"class 'yak' is not among the model's 2 classes .*'cat', 'dog'"):
        open_images(str(tmp_path), class_names=["cat", "dog"])


def test_one_class_of_a_model_is_enough(tmp_path: Path) -> None:
    images = open_images(str(make_folder(tmp_path, {"dog": 2})), class_names=["cat", "dog"])
    assert labels(images) == [1, 1]


def test_without_names_the_numbers_must_be_the_same(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 1, "dog": 1})
    assert open_images(str(tmp_path), num_classes=2).num_classes == 2
    with pytest.raises(DataError, match=r"2 classes .*but the model has 3"):
        open_images(str(tmp_path), num_classes=3)


def test_validation_takes_the_classes_of_training(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"ant": 1, "cat": 1, "dog": 1})
    make_folder(tmp_path / "val", {"cat": 1, "dog": 1})
    assert labels(open_splits(str(tmp_path))[1]) == [1, 2]
    make_folder(tmp_path / "val", {"yak": 1})
    with pytest.raises(DataError, match="class 'yak' is not among"):
        open_splits(str(tmp_path))


def test_hold_out_takes_a_share_of_every_class(tmp_path: Path) -> None:
    counts = {"a": 10, "b": 40, "c": 2, "d": 1}
    data = str(make_folder(tmp_path, counts))
    train, validation = open_splits(data, holdout=0.2, seed=1)
    # a fifth of each, but at least one on either side; a single image stays
    assert np.bincount(labels(validation), minlength=4).tolist() == [2, 8, 1, 0]
    assert np.bincount(labels(train)).tolist() == [8, 32, 1, 1]
    everything = sorted(grey(c, i) for c, n in enumerate(counts.values()) for i in range(n))
    assert sorted(pixels(train) + pixels(validation)) == everything


def test_hold_out_depends_on_the_seed_alone(tmp_path: Path) -> None:
    data = str(make_folder(tmp_path, {"a": 20, "b": 20}))
    first, again, other = (pixels(open_splits(data, holdout=0.3, seed=seed)[1]) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    # a seeded choice, not the first images of each class
    assert first != [grey(c, i) for c in range(2) for i in range(6)]


def test_hold_out_ignores_a_validation_split(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"a": 10, "b": 10})
    make_folder(tmp_path / "val", {"a": 1, "b": 1})
    train, validation = open_splits(str(tmp_path), holdout=0.1)
    assert (len(train), len(validation)) == (18, 2)
    assert validation.source == train.source


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_hold_out_share_out_of_range(tmp_path: Path, share: float) -> None:
    data = str(make_folder(tmp_path, {"a": 4, "b": 4}))
    with pytest.raises(RecipeError, match=r"--holdout .* is not in \(0, 1\)"):
        open_splits(data, holdout=share)


def test_nothing_to_hold_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no class has two images"):
        open_splits(str(make_folder(tmp_path, {"a": 1, "b": 1})), holdout=0.5)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(3, [1, 1, 1]), (8, [3, 3, 2]), (12, [5, 5, 2]), (26, [14, 10, 2]), (99, [30, 10, 2])],
)
def test_a_part_is_even_over_the_classes(tmp_path: Path, limit: int, expected: list[int]) -> None:
    data = str(make_tar(tmp_path / "d.tar", {"a": 30, "b": 10, "c": 2}))
    images = open_images(data, max_images=limit, seed=3)
    assert sorted(np.bincount(labels(images), minlength=3).tolist()) == sorted(expected)
    assert len(set(pixels(images))) == len(images) == sum(expected)


def test_a_part_smaller_than_the_number_of_classes(tmp_path: Path) -> None:
    data = str(make_folder(tmp_path, dict.fromkeys("abcdef", 2)))
    parts = [labels(open_images(data, max_images=2, seed=seed)) for seed in range(20)]
    assert all(len(set(part)) == 2 for part in parts)
    assert len({tuple(part) for part in parts}) > 5


def test_a_part_of_none(tmp_path: Path) -> None:
    data = str(make_folder(tmp_path, {"a": 2, "b": 2}))
    with pytest.raises(RecipeError, match="a limit of 0 images leaves no images"):
        open_images(data, max_images=0)


def test_parts_of_both_splits(tmp_path: Path) -> None:
    data = str(make_folder(tmp_path, {"a": 20, "b": 20}))
    train, validation = open_splits(data, holdout=0.5, max_images=4, max_validation_images=6)
    assert np.bincount(labels(train)).tolist() == [2, 2]
    assert np.bincount(labels(validation)).tolist() == [3, 3]
    assert not set(pixels(train)) & set(pixels(validation))


def numbered(root: Path) -> str:
    return str(make_folder(root / "data", {"1": 1, "10": 1, "2": 1}))


def test_order_of_classes_is_noted_where_programs_differ(tmp_path: Path) -> None:
    data = numbered(tmp_path)
    notice = open_images(data).order_notice
    assert notice is not None
    assert "('1', '2', '10')" in notice
    assert "('1', '10', '2')" in notice
    assert open_images(data, class_names=["1", "10", "2"]).order_notice is None
    case = open_images(str(make_folder(tmp_path / "case", {"apple": 1, "Zebra": 1}))).order_notice
    assert case is not None
    assert "('Zebra', 'apple')" in case
    assert open_images(str(make_folder(tmp_path / "plain", {"a1": 1, "a2": 1}))).order_notice is None


@pytest.mark.parametrize("text", ["1\n10\n2\n", "\ufeff1\r\n10 \r\n2\r\n\n"])
def test_file_of_class_names(tmp_path: Path, text: str) -> None:
    (tmp_path / "names.txt").write_bytes(text.encode())
    for split in ("train", "val"):
        numbered(tmp_path / split)
    names = str(tmp_path / "names.txt")
    train, validation = open_splits(
        str(tmp_path), class_names=names, train_split="train/data", validation_split="val/data"
    )
    assert train.class_names == validation.class_names == ("1", "10", "2")
    assert labels(train) == [0, 2, 1]  # images are in the folders' natural order


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"1\n\n2\n", "line 2 is empty"),
        (b"1\n2\n1\n", "line 3 repeats line 1"),
        (b"1\n", "fewer than two names"),
        (b"", "fewer than two names"),
        (b"\xff\xfe1", "cannot be read"),
    ],
)
def test_file_that_has_no_class_names(tmp_path: Path, text: bytes, problem: str) -> None:
    (tmp_path / "names.txt").write_bytes(text)
    with pytest.raises(DataError, match=rf"names\.txt: {problem}.*--class-names"):
        open_splits(numbered(tmp_path), class_names=str(tmp_path / "names.txt"), holdout=0.5)


def test_class_names_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("nowhere", "fifo"):
        with pytest.raises(DataError, match=rf"{name}: no such file; --class-names"):
            open_splits(numbered(tmp_path), class_names=str(tmp_path / name), holdout=0.5)


def test_folder_that_the_class_names_lack(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("1\n2\n")
    with pytest.raises(DataError, match="class '10' is not among"):
        open_splits(numbered(tmp_path), class_names=str(tmp_path / "names.txt"), holdout=0.5)
