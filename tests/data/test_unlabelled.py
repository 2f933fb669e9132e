"""Images without labels: in any folder, in a tar, held out without regard to classes."""

from pathlib import Path

import pytest

from nestify.data.dataset import Images, open_images, open_splits
from nestify.data.loaders import eval_loader
from nestify.data.validation import open_evaluation_images, record_held_out
from nestify.errors import DataError
from tests.data.builders import PREPROCESSING, grey, make_folder, make_tar, png


def targets(images: Images) -> list[int]:
    return [int(t) for _, batch in eval_loader(images, PREPROCESSING, batch_size=3) for t in batch]


def pixels(images: Images) -> list[int]:
    loader = eval_loader(images, PREPROCESSING, batch_size=3)
    return sorted(round(float(image[0, 0, 0]) * 255) for batch, _ in loader for image in batch)


def make_flat(root: Path, count: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (root / f"{i:03d}.png").write_bytes(png(i))
    return root


def test_images_lie_in_any_folder(tmp_path: Path) -> None:
    make_flat(tmp_path, 3)
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c" / "x.png").write_bytes(png(70))
    (tmp_path / "empty").mkdir()
    images = open_images(str(tmp_path), "train", labelled=False)
    assert pixels(images) == [0, 1, 2, 70]
    assert targets(images) == [0, 0, 0, 0]
    assert images.num_classes is images.class_names is None


def test_class_folders_and_tars_are_read_without_classes(tmp_path: Path) -> None:
    counts = {"cat": 2, "dog": 1}
    expected = [grey(0, 0), grey(0, 1), grey(1, 0)]
    for data in (make_folder(tmp_path / "folder", counts), make_tar(tmp_path / "d.tar", counts)):
        images = open_images(str(data), "train", class_names=["x", "y", "z"], labelled=False)
        assert pixels(images) == expected
        assert targets(images) == [0, 0, 0]
        assert images.class_names == ("x", "y", "z")


def test_split_folders_still_work(tmp_path: Path) -> None:
    make_flat(tmp_path / "train", 4)
    make_flat(tmp_path / "val", 2)
    train, validation = open_splits(str(tmp_path), labelled=False)
    assert (len(train), len(validation)) == (4, 2)


def test_hold_out_takes_a_share_of_all_images(tmp_path: Path) -> None:
    data = str(make_flat(tmp_path, 40))
    train, validation = open_splits(data, holdout=0.25, seed=1, labelled=False)
    again = open_splits(data, holdout=0.25, seed=1, labelled=False)[1]
    other = open_splits(data, holdout=0.25, seed=2, labelled=False)[1]
    assert (len(train), len(validation)) == (30, 10)
    assert sorted(pixels(train) + pixels(validation)) == list(range(40))
    assert pixels(validation) == pixels(again) != pixels(other)
    assert pixels(validation) != list(range(10))


@pytest.mark.parametrize("without", [True, False])
def test_eval_finds_the_held_out_images_with_and_without_labels(tmp_path: Path, without: bool) -> None:
    data = str(make_folder(tmp_path, {"a": 12, "b": 24}))
    train, validation = open_splits(data, holdout=0.25, seed=3, labelled=not without)
    record = record_held_out(train, 0.25, 3, "train")
    assert record.unlabelled is without
    for labelled in (True, False):
        images, used = open_evaluation_images(data, None, record, labelled=labelled)
        assert (used.used, used.trained, used.changed) == ("held-out", False, False)
        assert pixels(images) == pixels(validation)


def test_a_record_with_labels_has_no_new_key(tmp_path: Path) -> None:
    train, _ = open_splits(str(make_folder(tmp_path, {"a": 4, "b": 4})), holdout=0.25)
    assert "unlabelled" not in record_held_out(train, 0.25, 0, "train").model_dump()


def test_flat_folders_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--unlabelled"):
        open_images(str(make_flat(tmp_path / "flat", 2)), "train")
    with pytest.raises(DataError, match="--unlabelled"):
        open_images(str(make_folder(tmp_path / "albums", {"2023": 2, "2024": 2})), num_classes=10)
    with pytest.raises(DataError, match="--unlabelled"):
        open_images(str(make_folder(tmp_path / "one", {"2023": 2})), "train")


def test_one_image_and_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one image is too few to hold images out"):
        open_splits(str(make_flat(tmp_path / "one", 1)), holdout=0.5, labelled=False)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").write_text("no image")
    with pytest.raises(DataError, match=r"no images; it holds \.txt 1"):
        open_images(str(tmp_path / "none"), "train", labelled=False)


def test_labels_that_a_data_set_has_are_ignored(tmp_path: Path) -> None:
    images = open_images(str(make_folder(tmp_path, {"cat": 2, "dog": 1})), "train").without_labels()
    assert targets(images) == [0, 0, 0]
