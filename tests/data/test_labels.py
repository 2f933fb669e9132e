"""Tables of images with several labels each."""

from pathlib import Path

import pytest
from PIL import Image

from nestify.data.dataset import open_images, open_splits
from nestify.data.labels import read_labels
from nestify.data.loaders import eval_loader
from nestify.errors import DataError, RecipeError

PREPROCESSING = {
    "input_size": (3, 8, 8),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("train/1.png", "train/2.png", "train/10.png", "val/3.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return tmp_path / "photos"


def table(folder: Path, text: str) -> str:
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


LISTED = "file,labels\ntrain/1.png,sofa;cat\ntrain/2.png,\ntrain/10.png,cat\nval/3.png,sofa\n"
MARKED = "file,cat,sofa\ntrain/1.png,1,1\ntrain/2.png,0,0\ntrain/10.png,1,0\nval/3.png,0,1\n"


@pytest.mark.parametrize("text", [LISTED, MARKED])
def test_both_forms_give_the_same_targets(photos: Path, text: str) -> None:
    train, validation = open_splits(str(photos), labels=table(photos, text))
    assert train.class_names == ("cat", "sofa")
    assert (train.notices, train.order_notice, train.single_image_classes()) == ((), None, [])
    [(_, target)] = eval_loader(train, PREPROCESSING, batch_size=8)
    assert target.tolist() == [[1, 1], [0, 0], [1, 0]]  # 1, 2, 10
    [(_, target)] = eval_loader(validation, PREPROCESSING, batch_size=8)
    assert target.tolist() == [[0, 1]]
    assert train.class_counts(2) == [2, 1]


def test_paths_may_begin_in_the_folder_of_the_images(photos: Path, tmp_path: Path) -> None:
    text = "file,labels\n./1.png,cat\n10.png,cat\n2.png,dog\n"
    images = open_images(str(photos / "train"), "train", labels=table(tmp_path, text))
    [(_, target)] = eval_loader(images, PREPROCESSING, batch_size=8)
    assert target.tolist() == [[1, 0], [0, 1], [1, 0]]


def test_labels_are_those_of_the_model(photos: Path, tmp_path: Path) -> None:
    path = table(tmp_path, MARKED)
    names = ("sofa", "bed", "cat")
    images = open_images(str(photos), "train", labels=path, class_names=names)
    [(_, target)] = eval_loader(images, PREPROCESSING, batch_size=8)
    assert target.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 1]]
    assert images.class_counts(3) == [1, 0, 2]
    with pytest.raises(DataError, match="'sofa' is not among the model's"):
        open_images(str(photos), "train", labels=path, class_names=("cat", "bed"))


def test_held_out_images_keep_their_labels(photos: Path, tmp_path: Path) -> None:
    train, validation = open_splits(str(photos), holdout=0.3, labels=table(tmp_path, MARKED), seed=1)
    rows = train.label_rows() + validation.label_rows()
    assert sorted(rows) == [(), (0,), (0, 1)]
    assert (len(train), len(validation)) == (2, 1)


def test_rows_and_labels_without_images_are_told(photos: Path, tmp_path: Path) -> None:
    text = "file,cat,dog\n1.png,1,0\n2.png,1,0\n10.png,0,0\n4.png,0,1\nval/3.png,1,1\n"
    images = open_images(str(photos), "train", labels=table(tmp_path, text))
    rows, labels = images.notices
    assert "1 rows" in rows
    assert "4.png" in rows
    assert "dog" in labels


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        ("name,labels\na.png,cat\n", "first line must be file,labels"),
        ("file\na.png\n", "first line"),
        ("file,labels\na.png,cat,dog\n", "row 2 has 3 cells"),
        ("file,labels\n,cat\n", "row 2"),
        ("file,cat,dog\na.png,1,yes\n", "row 2 has 'yes' in the column dog"),
        ("file,cat,cat\na.png,1,0\n", "two labels are named 'cat'"),
        ("file,labels\na.png,cat\na.png,dog\n", "row 3 gives other labels for a.png"),
        ("file,labels\na.png,\n", "no labels"),
        ("file,cat,\na.png,1,0\n", "not a label's name"),
        ("file,labels\na.png,c\x07t\n", "not a label's name"),
        ("file,labels\ntrain/1.png,cat\n", r"no row for 2\.png and 1 other images"),
        ("file,cat\n1.png,0\n2.png,0\n10.png,0\n", "no image of .* has a label"),
    ],
)
def test_wrong_tables(photos: Path, tmp_path: Path, text: str, told: str) -> None:
    path = table(tmp_path, text)
    with pytest.raises(DataError, match=told):
        open_images(str(photos), "train", labels=path)


def test_tables_that_cannot_be_read(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--labels takes"):
        read_labels(str(tmp_path / "missing.csv"))
    (tmp_path / "wrong.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a CSV table"):
        read_labels(str(tmp_path / "wrong.csv"))
    with pytest.raises(RecipeError, match=r"--labels .* not for torch/"):
        open_images("torch/cifar10", "train", data_root=str(tmp_path), labels=table(tmp_path, MARKED))
