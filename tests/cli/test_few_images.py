"""Any number of training images: batches that leave one image over, where batch norm needs two."""

from pathlib import Path

import pytest

from tests.cli.conftest import Refused
from tests.cli.driver import nestify
from tests.data.builders import make_folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of 7 images, half as many to validate on."""
    make_folder(tmp_path / "photos" / "train", {"a": 7, "b": 7})
    make_folder(tmp_path / "photos" / "validation", {"a": 4, "b": 3})
    return tmp_path / "photos"


RESNET = (
    *("compress", "test_resnet", "--set", "model.pretrained=false", "--input-size", "32"),
    *("--set", "train.eval_before=false", "-o", "x.safetensors"),
)
"""At 32 pixels its last stage sees one pixel per image."""


LEFT_OVER = [
    pytest.param(schedule, images, batch, epochs, marks=() if default else pytest.mark.long)
    for number, (images, batch) in enumerate([(9, 4), (6, 1), (3, 2), (2, 1)])
    for schedule in ("weight", "channel")
    for epochs in ("0", "1")
    for default in [
        (schedule == "weight") == (number % 2 == 0) and epochs == str(number // 2) and images != 6
    ]
]
"""Each schedule, trained and untrained levels, and batches of one; the other combinations are `long`."""


@pytest.mark.parametrize(("schedule", "images", "batch", "epochs"), LEFT_OVER)
def test_one_image_is_left_over(photos: Path, schedule: str, images: int, batch: int, epochs: str) -> None:
    options = ("--max-train", str(images), "--batch-size", str(batch), "--epochs", epochs)
    levels = "0.5,0" if schedule == "weight" else "0.5,1"
    done = nestify(*RESNET, *options, "--data", photos, "--schedule", schedule, "--levels", levels)
    assert done.code == 0, done.err
    assert "layer4.0.bn1" in done.err
    assert "two images" in done.err


def test_a_fresh_classifier_and_shared_batch_norm(photos: Path) -> None:
    options = ("--new-head", "--finetune-epochs", "1", "--epochs", "1", "--bn", "recalibrate")
    done = nestify(*RESNET, *options, "--data", photos, "--max-train", "9", "--batch-size", "4")
    assert done.code == 0, done.err


def test_batch_norm_in_the_classifier(photos: Path) -> None:
    """levit normalises the pooled features, so that every input size needs two images."""
    kwargs = "model.kwargs={embed_dim=[32, 48, 64], num_heads=[2, 3, 4], depth=[1, 1, 1]}"
    options = ("--set", "model.pretrained=false", "--levels", "0.5,0", "--set", "train.eval_before=false")
    done = nestify(
        *(
            "compress",
            "levit_128s",
            "--set",
            kwargs,
            *options,
            "--data",
            photos,
            "--batch-size",
            "1",
            "--epochs",
            "0.2",
        ),
        *("--max-train", "3", "-o", "x.safetensors"),
    )
    assert done.code == 0, done.err
    assert "head.bn" in done.err
    assert "--batch-size 1" in done.err


@pytest.mark.parametrize("batch", [1, *(pytest.param(batch, marks=pytest.mark.long) for batch in (2, 3))])
def test_unreadable_images_leave_batches_of_one(photos: Path, batch: int) -> None:
    for image in sorted((photos / "train" / "a").iterdir())[:6]:
        image.write_bytes(b"no image")
    options = ("--on-bad-image", "skip", "--batch-size", str(batch), "--epochs", "2")
    done = nestify(*RESNET, *options, "--data", photos, "--schedule", "channel", "--levels", "0.5,1")
    assert done.code == 0, done.err
    if batch < 3:
        assert "had a single readable image" in done.err


def test_a_model_whose_norms_see_many_pixels_takes_batches_of_one(photos: Path) -> None:
    options = ("--input-size", "64", "--batch-size", "1", "--max-train", "3", "--epochs", "1")
    done = nestify(*RESNET, *options, "--data", photos)
    assert done.code == 0, done.err
    assert "batch norm (" not in done.err


def test_a_single_image_is_too_few(photos: Path, refused: Refused) -> None:
    message = refused(3, *RESNET, "--data", photos, "--max-train", "1", "--batch-size", "1")
    assert "1 training images" in message
    assert "use more images" in message
