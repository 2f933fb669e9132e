"""`nestify bench --rivals`: who runs, what is skipped with a sentence, and what is refused."""

import sys
from pathlib import Path

import pytest

from tests.cli.driver import nestify
from tests.engine.conftest import library, library_path

__all__ = ["library", "library_path"]  # fixtures
QUICK = ("--rivals", "--warmup", "0", "--rounds", "3", "--batch-size", "1", "--threads", "1")


@pytest.fixture
def _engine(library: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.long
@pytest.mark.usefixtures("_engine")
def test_levels_and_rivals(digits_file: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    words = ("--level", "level1", "--data", digits_folder, "--json")
    document = nestify("bench", digits_file, *QUICK, *words).document
    assert (document["schema_version"], document["file"]) == (1, str(digits_file))
    assert document["calibration"] == str(digits_folder)
    assert "pip install openvino" in " ".join(document["skipped"])
    [match] = document["matches"]
    assert (match["threads"], match["batch_size"], match["rounds"]) == (1, 1, 3)
    found = [(each["name"], each["runtime"].split()[0], each["dtype"]) for each in match["contenders"]]
    assert found == [
        ("level1", "torch", "float32"),
        ("level3", "torch", "float32"),
        ("level1", "engine", "float32"),
        ("level3", "onnxruntime", "float32"),
        ("level3", "onnxruntime", "int8"),
    ]
    by_dtype = {each["dtype"]: each for each in match["contenders"]}
    assert by_dtype["int8"]["over_best_int8"] == 1
    for each in match["contenders"]:
        assert each["p25_seconds"] <= each["p75_seconds"]
        assert each["over_best_int8"] == pytest.approx(each["p25_seconds"] / by_dtype["int8"]["p25_seconds"])


@pytest.mark.long
def test_a_table_without_the_engine(digits_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTIFY_ENGINE_LIBRARY", "none.so")
    monkeypatch.setenv("COLUMNS", "200")
    from nestify.engine.library import load_library

    load_library.cache_clear()
    done = nestify("bench", digits_file, *QUICK, "--level", "3")
    load_library.cache_clear()
    assert (done.code, done.err) == (0, "")
    assert "Sparse engine: NESTIFY_ENGINE_LIBRARY=none.so" in done.out
    assert "over int8" in done.out
    assert "engine on" not in done.out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--data", "photos"), ("--data", "--rivals")),
        (("--rivals", "--save"), ("--rivals", "--save")),
        (("--rivals", "--device", "cuda"), ("--rivals", "--device cuda")),
        (("--rivals", "--level", "tiny"), ("tiny",)),
    ],
)
def test_bad_usage(words: tuple[str, ...], named: tuple[str, ...], digits_file: Path) -> None:
    done = nestify("bench", digits_file, *words)
    assert (done.code, done.out) == (2, "")
    for part in named:
        assert part in done.message
