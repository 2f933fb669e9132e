"""Images that are missing, empty, damaged, or whose classes do not fit the model."""

import shutil
import tarfile
from pathlib import Path

from tests.cli.conftest import Refused
from tests.cli.driver import TWO_STEPS, UNTRAINED, events, nestify

START = ("compress", "digits", *UNTRAINED, "--data")


def test_missing(refused: Refused) -> None:
    assert refused(3, *START, "nowhere").startswith("nowhere: no such file or folder; --data takes")


def test_empty_folder(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refused(3, *START, "empty").startswith("empty: no images in class folders")


def test_empty_split(refused: Refused, images: Path) -> None:
    shutil.rmtree(images / "train")
    (images / "train").mkdir()
    assert refused(3, *START, images).startswith(f"{images}/train: no images")


def test_missing_split(refused: Refused, images: Path) -> None:
    assert "no split 'first'; it holds train/, validation/; name the right one with --train-split" in refused(
        3, *START, images, "--train-split", "first"
    )
    (images / "validation").rename(images / "checking")
    message = refused(3, *START, images)
    assert "no split 'validation'; it holds checking/, train/; name the right one with --val-split" in message
    assert message.endswith("compress can also set training images aside (--holdout 0.1)")
    assert nestify(*START, images, "--holdout", "0.1", "--dry-run").code == 0


def test_splits_inside_a_tar(refused: Refused, images: Path, digits_file: Path) -> None:
    """A tar is one split, so that images to validate on would be trained on."""
    with tarfile.open("photos.tar", "w") as tar:
        tar.add(images, "photos")
    for command in (START, ("eval", digits_file, "--data"), ("scan", "test_resnet", "--data")):
        message = refused(3, *command, "photos.tar")
        assert (
            "photos.tar: holds several splits, photos/train and photos/validation; give a folder" in message
        )
        assert "--train-split ." in message
    message = refused(3, *START, "photos.tar", "--val-split", "val")
    assert "a tar is one split: give a folder with a tar of each" in message


def test_one_split_that_is_named_twice(refused: Refused, images: Path) -> None:
    words = ("--train-split", "train", "--val-split", "train")
    assert "training and validation would use the same images" in refused(3, *START, images, *words)


def test_a_class_more_or_less(refused: Refused, images: Path) -> None:
    for split in ("train", "validation"):
        (images / split / "3").rename(images / split / "9b")
        shutil.copytree(images / split / "4", images / split / "extra")
    message = refused(3, *START, images, "--keep-head")
    assert f"predicts 10 classes (fc.weight), {images}/train has 11;" in message


def test_a_validation_class_that_is_not_trained(refused: Refused, images: Path) -> None:
    shutil.copytree(images / "validation" / "4", images / "validation" / "zebra")
    assert "class 'zebra' is not among the model's 10 classes" in refused(3, *START, images)


def test_a_damaged_image(refused: Refused, images: Path) -> None:
    whole_epoch = ("--epochs", "1", "--batch-size", "40")  # of 200 images
    words = ("compress", "digits", *TWO_STEPS, *whole_epoch, "--data", images)
    damaged = sorted((images / "train" / "3").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:40])
    message = refused(3, *words)
    assert message.startswith(f"{damaged}: not a readable image (")
    assert message.endswith("replace or remove it, or pass --on-bad-image skip")

    done = nestify(*words, "--on-bad-image", "skip")
    assert done.code == 0
    assert f"training images: skipped 1 unreadable image: {damaged}" in done.err.splitlines()
    [skipped] = events(Path("digits.metrics.jsonl"), "skipped")
    assert (skipped["split"], list(skipped["images"])) == ("training", [str(damaged)])


def test_a_damaged_validation_image(refused: Refused, images: Path) -> None:
    words = ("compress", "digits", *UNTRAINED, "--max-val", "1000", "--data", images)
    damaged = sorted((images / "validation" / "0").iterdir())[:2]
    for file in damaged:
        file.write_bytes(b"no image")
    assert refused(3, *words).startswith(f"{damaged[0]}: not a readable image (")
    done = nestify(*words, "--on-bad-image", "skip", "--json")
    assert {level["images"] for level in done.document["levels"]} == {78}
    named = ", ".join(map(str, damaged))
    assert f"validation images: skipped 2 unreadable images: {named}" in done.err.splitlines()


def test_a_file_is_evaluated_on_the_split_that_it_was_validated_on(images: Path, tmp_path: Path) -> None:
    (images / "validation").rename(images / "test")
    file, validated = tmp_path / "levels.nested.safetensors", ("--val-split", "test")
    assert nestify(*START, images, *validated, "-o", file).code == 0
    alike = [nestify("eval", file, "--data", images, *words, "--json") for words in ((), validated)]
    assert [each.code for each in alike] == [0, 0]
    scores = [[(level["top1"], level["loss"]) for level in each.document["levels"]] for each in alike]
    assert scores[0] == scores[1]
