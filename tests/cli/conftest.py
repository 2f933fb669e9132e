"""Digits as a nested file and as folders, made once; every test runs in its own folder."""

import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.driver import DIGITS, UNTRAINED, nestify

Refused = Callable[..., str]

IMAGES_PER_CLASS = {"train": 20, "validation": 8}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained nested file of three levels; tests must not change it."""
    path = tmp_path_factory.mktemp("digits") / "digits.nested.safetensors"
    done = nestify("compress", "digits", *UNTRAINED, "-o", path)
    assert done.code == 0, done.err
    return path


@pytest.fixture(scope="session")
def quads_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained nested file whose levels have blocks of 1x4, of which some layers are packed."""
    path = tmp_path_factory.mktemp("quads") / "quads.nested.safetensors"
    done = nestify(
        "compress",
        "digits",
        *UNTRAINED,
        "--pattern",
        "1x4",
        "--score",
        "uniform",
        "--levels",
        "0.6,0",
        "-o",
        path,
    )
    assert done.code == 0, done.err
    return path


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few digits as a folder of splits with class folders; tests must not change it."""
    root = tmp_path_factory.mktemp("images")
    for split, count in IMAGES_PER_CLASS.items():
        seen: Counter[str] = Counter()
        with tarfile.open(DIGITS / f"{split}.tar") as tar:
            for member in tar.getmembers():
                name = Path(member.name)
                if not member.isfile() or seen[name.parent.name] == count:
                    continue
                seen[name.parent.name] += 1
                file = tar.extractfile(member)
                assert file is not None
                target = root / split / name.parent.name / name.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read())
    return root


@pytest.fixture
def images(digits_folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder of digits that tests may damage."""
    return Path(shutil.copytree(digits_folder, tmp_path / "images"))


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Run a command that must fail: `refused(code, *words)` returns its error message.

    It checks that nothing is printed on standard output, and that no file is written, changed or left
    behind, in particular no older output. Only the log and the checkpoint of a run may remain.
    """

    def run(code: int, *words: str | Path) -> str:
        older = tmp_path / "digits.nested.safetensors"
        older.write_bytes(b"an older file")
        before = _files_in(tmp_path)
        done = nestify(*words)
        assert done.code == code, (done.code, done.err)
        assert done.out == ""
        after = _files_in(tmp_path)
        for files in (before, after):
            for name in ("digits.metrics.jsonl", "digits.resume.safetensors"):
                files.pop(tmp_path / name, None)
        assert after == before
        return done.message

    return run


def _files_in(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
