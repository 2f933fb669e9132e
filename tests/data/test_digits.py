"""The embedded digits images against their source."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset

import nestify
from nestify.data.dataset import open_splits
from nestify.data.loaders import eval_loader
from tests.data.builders import PREPROCESSING

FOLDER = Path(nestify.__file__).parent / "recipes" / "digits"
# images of each digit in optdigits.tes, as UCI's description of the data set counts them
SOURCE_COUNTS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def members(name: str) -> dict[str, bytes]:
    with tarfile.open(FOLDER / f"{name}.tar") as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def test_counts() -> None:
    train, validation = (
        create_dataset("", root=str(FOLDER / f"{name}.tar")) for name in ("train", "validation")
    )
    assert list(train.reader.class_name_to_idx) == list(map(str, range(10)))
    counts = [np.bincount(part.reader.targets) for part in (train, validation)]
    assert (counts[0] + counts[1]).tolist() == SOURCE_COUNTS
    assert counts[1].tolist() == [round(n / 5) for n in SOURCE_COUNTS]  # stratified
    assert not set(members("train")) & set(members("validation"))


def test_size_and_headers() -> None:
    assert sum(path.stat().st_size for path in FOLDER.glob("*.tar")) < 2.5e6
    for name in ("train", "validation"):
        with tarfile.open(FOLDER / f"{name}.tar") as tar:
            infos = tar.getmembers()
        assert [info.name for info in infos] == sorted(info.name for info in infos)
        assert {(info.mtime, info.uid, info.gid, info.uname, info.mode) for info in infos} == {
            (0, 0, 0, "", 0o644)
        }


def test_pixels_are_the_source_values() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    everything = members("train") | members("validation")
    assert len(everything) == len(digits.images) == 1797
    for name, data in everything.items():
        label, row = int(name.split("/")[0]), int(Path(name).stem)
        image = Image.open(io.BytesIO(data))
        assert image.mode == "L"
        np.testing.assert_array_equal(np.rint(np.asarray(image, float) * 16 / 255), digits.images[row])
        assert label == digits.target[row]


def test_maker_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    script = Path(__file__).parents[2] / "recipes" / "make_digits.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    for name in ("train.tar", "validation.tar"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_digits_by_name() -> None:
    train, validation = open_splits("embedded/digits")
    assert (len(train), len(validation)) == (1438, 359)
    images, targets = next(
        iter(eval_loader(validation, {**PREPROCESSING, "input_size": (1, 8, 8)}, batch_size=359))
    )
    assert images.shape == (359, 1, 8, 8)
    assert targets.unique().tolist() == [*range(10)]
