"""Data sets that give their images one after the other, with a hand-made reader in place of a package's."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from timm.data.dataset import IterableImageDataset

from nestify.data import source
from nestify.data.dataset import Images, open_images
from nestify.data.loaders import eval_loader, train_loader
from nestify.errors import DataError
from tests.data.builders import NO_CHANGE, PREPROCESSING


class Reader:
    """Gives images of grey i and label i % 2, as many as `gives`; says that there are ten."""

    num_samples = 10

    def __init__(self) -> None:
        self.class_to_idx = {"even": 0, "odd": 1}
        self.gives = 10
        self.fails_at = -1
        self.label_at: dict[int, Any] = {}
        self.epoch = -1

    def __iter__(self) -> Iterator[tuple[Image.Image, Any]]:
        for i in range(self.gives):
            if i == self.fails_at:
                raise OSError("connection lost\nin the middle")
            yield Image.new("RGB", (8, 8), (i, i, i)), self.label_at.get(i, i % 2)

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, number: int) -> None:
        self.epoch = number


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    reader = Reader()
    spec = importlib.util.spec_from_loader("webdataset", None, origin="here")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(
        source, "create_dataset", lambda *args, **kwargs: IterableImageDataset("shards", reader=reader)
    )
    return reader


def greys(images: Images) -> list[int]:
    loader = eval_loader(images, PREPROCESSING, batch_size=4)
    return [round(float(image[0, 0, 0]) * 255) for batch, _ in loader for image in batch]


def test_stream(reader: Reader) -> None:
    images = open_images("wds/shards", "train", class_names=["odd", "even"])
    assert len(images) == 10
    loader = eval_loader(images, PREPROCESSING, batch_size=4)
    assert [targets.tolist() for _, targets in loader] == [[1, 0, 1, 0], [1, 0, 1, 0], [1, 0]]
    assert len(loader) == 3
    assert greys(images) == [*range(10)]


def test_training_stream(reader: Reader) -> None:
    images = open_images("wds/shards", "train")
    loader = train_loader(images, PREPROCESSING, batch_size=4, augment=NO_CHANGE)
    assert len(list(loader.epoch(7))) == len(loader) == 2
    assert reader.epoch == 7
    assert len(list(loader.epoch(7, first_batch=1))) == 1


def test_stream_that_breaks_off(reader: Reader) -> None:
    reader.fails_at = 6
    with pytest.raises(DataError, match=r"^wds/shards \(split 'train'\): cannot be used: connection lost$"):
        greys(open_images("wds/shards", "train"))


def test_stream_that_passes_bad_images_over(reader: Reader) -> None:
    reader.gives = 8
    with pytest.raises(DataError, match="2 of 10 images were not delivered"):
        greys(open_images("wds/shards", "train"))
    images = open_images("wds/shards", "train", on_bad_image="skip")
    assert greys(images) == [*range(8)]
    assert images.skipped == {"wds/shards (split 'train')": "2 images were not delivered"}


@pytest.mark.parametrize("label", [-1, 2, [0, 1], None, 0.5])
@pytest.mark.parametrize("class_names", [None, ["odd", "other", "even"]])
def test_labels_that_are_no_class(reader: Reader, label: Any, class_names: list[str] | None) -> None:
    reader.label_at = {3: label}
    images = open_images("wds/shards", "train", class_names=class_names, on_bad_image="skip")
    with pytest.raises(DataError, match="cannot be used: a label is"):
        greys(images)


def test_stream_cannot_be_divided(reader: Reader) -> None:
    images = open_images("wds/shards", "train")
    with pytest.raises(DataError, match="a stream cannot be divided"):
        images.at_most(5)
    with pytest.raises(DataError, match="a stream cannot be divided"):
        images.hold_out(0.1)
