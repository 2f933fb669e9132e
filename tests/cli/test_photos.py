"""Photos as users have them: turned, with other files, in another order; compress and eval agree."""

import os
from pathlib import Path

import pytest
from PIL import Image

from nestify.file.reader import open_nested_file
from tests.cli.conftest import Refused
from tests.cli.driver import UNTRAINED, nestify, stored_recipe

DIGITS = ("compress", "digits", *UNTRAINED, "--data")


def top1(file: Path, data: Path) -> float:
    done = nestify("eval", file, "--data", data, "--level", "3", "--json")
    assert done.code == 0, done.err
    found: float = done.document["levels"][0]["top1"]
    return found


@pytest.fixture
def turned(images: Path) -> Path:
    """The images stored on their side, with the EXIF orientation that turns them upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored image is turned to the left
    for path in images.rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    return images


def test_compress_and_eval_turn_photos_alike(turned: Path, digits_folder: Path, digits_file: Path) -> None:
    assert open_nested_file(digits_file).manifest.model.preprocessing.exif_orientation
    upright = top1(digits_file, digits_folder)
    assert top1(digits_file, turned) == upright
    plain = Path("plain.nested.safetensors")
    assert nestify(*DIGITS, turned, "--no-exif-orientation", "-o", plain).code == 0
    assert "exif_orientation" not in open_nested_file(plain).manifest.model.preprocessing.model_dump()
    assert stored_recipe(plain)["data"]["exif_orientation"] is False
    assert top1(plain, turned) < upright - 20  # as stored, on their side
    measured = open_nested_file(plain).manifest.levels[-1].metrics.top1
    assert measured is not None
    assert measured < upright - 20


def test_old_files_do_not_turn_photos() -> None:
    golden = Path(__file__).parents[1] / "file" / "golden"
    files = sorted(golden.glob("*.safetensors"))
    assert files
    for file in files:
        assert not open_nested_file(file).manifest.model.preprocessing.exif_orientation


def rename(images: Path) -> None:
    for split in ("train", "validation"):
        (images / split / "2").rename(images / split / "10")


NAMES = "0\n1\n10\n3\n4\n5\n6\n7\n8\n9\n"


def test_order_of_classes(images: Path, digits_folder: Path, digits_file: Path) -> None:
    rename(images)
    wrong = nestify(*DIGITS, images, "-o", "wrong.nested.safetensors")
    assert wrong.code == 0
    assert "natural order" in wrong.err
    assert "--class-names" in wrong.err
    expected = top1(digits_file, digits_folder)
    assert top1(Path("wrong.nested.safetensors"), images) < expected - 20
    Path("folder").mkdir()
    Path("folder/names.txt").write_text(NAMES)
    Path("folder/r.toml").write_text('extends = "digits"\n[data]\nclass_names = "names.txt"\n')
    for source, flags in (("digits", ("--class-names", "folder/names.txt")), ("folder/r.toml", ())):
        right = nestify(
            *DIGITS[:1], source, *UNTRAINED, "--data", images, *flags, "-o", "r.nested.safetensors"
        )
        assert right.code == 0, right.err
        assert "natural order" not in right.err
        assert open_nested_file("r.nested.safetensors").manifest.model.class_names == NAMES.split()
        assert top1(Path("r.nested.safetensors"), images) == expected


def test_ignored_files_are_counted_by_compress_and_eval(images: Path, digits_file: Path) -> None:
    for name in ("a.txt", "b.txt", "._0.png", "c.eps"):
        (images / "validation" / "4" / name).write_bytes(b"x")
    notice = f"{images}/validation: ignored 4 files (.txt 2, .eps 1, hidden 1)"
    done = nestify(*DIGITS, images)
    assert done.code == 0
    assert notice in done.err
    assert notice in nestify("eval", digits_file, "--data", images).err


def test_endless_links_and_devices(refused: Refused, images: Path) -> None:
    os.mkfifo(images / "train" / "4" / "fifo.png")
    assert "not a regular file 1" in nestify(*DIGITS, images).err
    (images / "train" / "4" / "loop").symlink_to("/")
    assert "contains the images; remove it" in refused(3, *DIGITS, images)
