"""Which split of the data a nested file is evaluated on, if none is named."""

from pathlib import Path

import pytest

from nestify.data.validation import open_evaluation_images, recorded_split
from nestify.errors import DataError
from tests.data.builders import make_folder


def make_splits(root: Path, **images: int) -> str:
    for split, count in images.items():
        make_folder(root / split, {"cat": count, "dog": 1})
    return str(root)


@pytest.mark.parametrize(
    ("splits", "recorded", "count"),
    [
        ({"train": 1, "test": 2}, "test", 2),
        ({"train": 1, "held": 3}, "held", 3),
        ({"train": 1, "test": 2, "val": 4}, "test", 4),  # the usual name comes first, whatever was recorded
        ({"train": 1, "validation": 5}, "test", 5),
        ({"train": 1, "val": 4}, "elsewhere", 4),
    ],
)
def test_the_split_that_the_file_was_validated_on_is_used_where_there_is_no_validation(
    tmp_path: Path, splits: dict[str, int], recorded: str, count: int
) -> None:
    images, used = open_evaluation_images(make_splits(tmp_path, **splits), None, None, recorded)
    assert len(images) == used.count == count + 1


def test_a_split_that_is_named_is_never_replaced(tmp_path: Path) -> None:
    data = make_splits(tmp_path, train=1, test=2)
    with pytest.raises(DataError, match="no split 'validation'"):
        open_evaluation_images(data, "validation", None, "test")
    for recorded in (None, "held"):
        with pytest.raises(DataError, match=r"no split 'validation'; it holds test/, train/; .*--val-split"):
            open_evaluation_images(data, None, None, recorded)


def test_the_recorded_split() -> None:
    assert recorded_split({"data": {"val_split": "test"}}) == "test"
    for recipe in ({}, {"data": {}}, {"data": None}, {"data": {"val_split": 3}}):
        assert recorded_split(recipe) is None
