"""Atomic writes, locks, and outputs that are inputs."""

import errno
import os
from pathlib import Path

import pytest

from nestify.errors import OutputError
from nestify.files import atomic_file, atomic_folder, check_apart, is_same_file, lock_output


def test_the_same_file_by_other_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a"
    file.touch()
    os.link(file, tmp_path / "hard")
    (tmp_path / "soft").symlink_to("a")
    for same in ("a", "./a", "../" + tmp_path.name + "/a", "hard", "soft", file):
        assert is_same_file(same, file)
    (tmp_path / "b").touch()
    for other in ("b", "missing", "https://a", "a\0", "", tmp_path):
        assert not is_same_file(other, file)
    assert is_same_file("missing", tmp_path / "missing")


def test_an_output_is_no_input(tmp_path: Path) -> None:
    check_apart(tmp_path / "a", {"the table": None, "the recipe": tmp_path / "b"})
    with pytest.raises(OutputError, match=r"a: is the recipe; choose another path"):
        check_apart(tmp_path / "a", {"the table": None, "the recipe": tmp_path / "a"})


@pytest.mark.parametrize("full", [True, False])
def test_a_folder_that_cannot_be_written_names_the_remedy(full: bool, tmp_path: Path) -> None:
    code = errno.ENOSPC if full else errno.EACCES
    remedy = "make room" if full else "choose a new folder"
    with (
        pytest.raises(OutputError, match=rf"new: cannot be written \({os.strerror(code)}\); {remedy}"),
        atomic_folder(tmp_path / "new", lambda _: None),
    ):
        raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []


def test_a_file_inside_a_folder_is_named_by_its_place(tmp_path: Path) -> None:
    """And not by the temporary folder, which is gone when the message is read."""
    folder = tmp_path / "new"
    with (
        pytest.raises(OutputError) as told,
        atomic_folder(folder, lambda _: None) as temporary,
        atomic_file(temporary / "a" / "model"),
    ):
        pass
    assert str(told.value).startswith(f"{folder / 'a' / 'model'}: cannot be written")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_the_users_file_stays(tmp_path: Path) -> None:
    (tmp_path / "uv.lock").write_text("version = 1\n")
    with lock_output(tmp_path / "uv.nested.safetensors", pytest.fail):
        pass
    with lock_output(tmp_path / "other.nested.safetensors", pytest.fail):
        assert (tmp_path / "other.lock").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["uv.lock"]
    assert (tmp_path / "uv.lock").read_text() == "version = 1\n"
