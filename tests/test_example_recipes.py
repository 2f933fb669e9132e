"""The recipes folder: every recipe is right, and the CIFAR-100 script writes what nestify reads."""

import importlib.util
import io
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nestify.data.dataset import open_images
from nestify.recipe.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
SHARED = ("cifar100", "imagenet")  # what others extend
RECIPES = sorted(path for path in FOLDER.glob("*.toml") if path.stem not in SHARED)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_right(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert len(recipe.levels) == 3
    for other in (recipe.model.checkpoint, recipe.data.hierarchy):
        assert other is None or Path(other).is_file()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("imagenet*.toml")), ids=lambda path: path.stem)
def test_recipes_that_were_not_run_say_so(path: Path) -> None:
    assert "NOT RUN" in path.read_text()


def test_names_of_outputs_do_not_clash() -> None:
    outputs = [load_recipe(str(path)).output_path for path in RECIPES]
    assert len(set(outputs)) == len(outputs)


def test_cifar100_is_written_as_it_is_read(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_cifar100", FOLDER / "make_cifar100.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    labels = [1, 0, 1, 2, 2, 0]
    pairs = [(Image.fromarray(image), label) for image, label in zip(pixels, labels, strict=True)]
    script.write_tar(tmp_path / "test.tar", pairs, ["apple", "bear", "cloud"])
    assert open_images(str(tmp_path), "test").class_names == ("apple", "bear", "cloud")
    with tarfile.open(tmp_path / "test.tar") as tar:
        names = tar.getnames()
        found = [np.asarray(Image.open(io.BytesIO(tar.extractfile(name).read()))) for name in names]  # type: ignore[union-attr]
    assert [name.split("/")[0] for name in names] == [("apple", "bear", "cloud")[label] for label in labels]
    np.testing.assert_array_equal(np.stack(found), pixels)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("detector.py --help", 0, "training steps"),
        ("make_cifar100.py --help", 0, "where to write"),
        ("make_digits.py --help", 0, "where to write"),
        ("detector.py 0", 2, "1 or more"),
        ("detector.py 1 0.5", 2, "1 level given"),
        ("detector.py 1 0.5,1 more", 2, "more"),
        ("make_digits.py a b", 2, "b"),
    ],
)
def test_scripts_say_what_they_take(
    command: str,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    words = command.split()
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / words[0]), run_name="__main__")
    shown = capsys.readouterr()
    assert ended.value.code == code
    assert said in (shown.err if code else shown.out)
    assert not list(tmp_path.iterdir())


def test_every_class_of_cifar100_has_a_superclass() -> None:
    rows = (FOLDER / "cifar100-superclasses.csv").read_text().splitlines()
    assert rows[0] == "fine,coarse"
    fine, coarse = zip(*(row.split(",") for row in rows[1:]), strict=True)
    assert (len(set(fine)), len(set(coarse))) == (100, 20)
    assert all(coarse.count(name) == 5 for name in coarse)  # as the data set's page has it
