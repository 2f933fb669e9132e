"""Finding, building and loading the library, and one sentence of help where that fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nestify.engine import build as building
from nestify.engine import library as libraries
from nestify.engine.build import BuildError, compile_library, find_compiler
from nestify.engine.library import VARIABLE, Library, build, built_path, find_library
from nestify.errors import SetupError


@pytest.fixture
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No library in the package or in the cache."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(libraries, "LIBRARY_NAME", "none.so")


@pytest.mark.usefixtures("nothing_installed")
def test_a_missing_library_says_how_to_get_it() -> None:
    with pytest.raises(SetupError, match=r"nestify engine --build.*C\+\+ compiler"):
        find_library()


@pytest.mark.usefixtures("nothing_installed")
def test_a_library_in_the_cache_is_found(tmp_path: Path) -> None:
    path = built_path()
    assert path.is_relative_to(tmp_path / "cache" / "nestify")
    path.parent.mkdir(parents=True)
    path.touch()
    assert find_library() == path


def test_the_variable_names_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "missing.so"))
    with pytest.raises(SetupError, match=f"{VARIABLE}=.*missing.so.*unset it"):
        find_library()


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(building, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler; install"):
        find_compiler()
    monkeypatch.setattr(building, "find_spec", lambda name: name == "ziglang")
    assert find_compiler() == [sys.executable, "-m", "ziglang", "c++"]
    monkeypatch.setenv("CXX", "ccache g++")
    assert find_compiler() == ["ccache", "g++"]


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "compiler"
    script.write_text("#!/bin/sh\necho 'x.cpp:1: error: unknown option' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(BuildError, match=r"unknown option.*set CXX"):
        compile_library(tmp_path / "new" / "library.so")
    assert list((tmp_path / "new").iterdir()) == []
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SetupError, match="No such file"):
        build()


@pytest.mark.parametrize(
    ("name", "triple", "library"),
    [
        ("linux-aarch64", "aarch64-linux-gnu.2.28", "libnestify_engine.so"),
        ("macos-arm64", "aarch64-macos.11.0", "libnestify_engine.dylib"),
        ("windows-x86_64", "x86_64-windows-gnu", "nestify_engine.dll"),
    ],
)
def test_other_platforms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, triple: str, library: str
) -> None:
    """They are compiled by ziglang, here one that writes down its arguments."""
    (tmp_path / "ziglang.py").write_text(
        "import sys\nopen(sys.argv[-1], 'w').write(' '.join(sys.argv[1:]))\n"
        "open(sys.argv[-1] + '.lib', 'w').write('an import library, as zig makes one for Windows')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(building, "find_spec", lambda name: name == "ziglang")
    monkeypatch.setenv("CXX", "none")
    monkeypatch.setenv(building.TARGET_VARIABLE, name)
    target = building.chosen_target()
    compile_library(tmp_path / "new" / target.library_name, target)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [library]
    command = (tmp_path / "new" / library).read_text().split()
    assert command[:3] == ["c++", "-target", triple]
    assert ("-fPIC" in command) == (name != "windows-x86_64")
    assert any(word.endswith("-install_name,@rpath/" + library) for word in command) == (
        name == "macos-arm64"
    )
    monkeypatch.setattr(building, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match=f"{triple}; pip install ziglang"):
        compile_library(tmp_path / "other", target)


@pytest.mark.long
def test_ziglang_makes_the_same_choice(
    tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its libraries once found no instruction set of any x86 processor."""
    pytest.importorskip("ziglang", reason="pip install ziglang")
    monkeypatch.setenv("CXX", f"{sys.executable} -m ziglang c++")
    compile_library(tmp_path / "library.so")
    assert Library(tmp_path / "library.so").isa == library.isa


def test_an_unknown_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(building.TARGET_VARIABLE, "plan9")
    with pytest.raises(BuildError, match=r"NESTIFY_ENGINE_TARGET=plan9.*linux-aarch64"):
        building.chosen_target()
    monkeypatch.setenv(building.TARGET_VARIABLE, "")
    assert building.chosen_target() == building.TARGETS["native"]


def test_other_libraries_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(SetupError, match=r"text\.so.*nestify engine --build"):
        Library(tmp_path / "text.so")


def test_a_library_of_another_version(library_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "INTERFACE", 99)
    with pytest.raises(SetupError, match="another version"):
        Library(library_path)


def test_an_unknown_instruction_set(library_path: Path) -> None:
    code = "from nestify.engine.library import load_library; load_library()"
    environment = {**os.environ, VARIABLE: str(library_path), "NESTIFY_ENGINE_ISA": "mmx"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    last = done.stderr.splitlines()[-1]
    assert "SetupError: NESTIFY_ENGINE_ISA=mmx" in last
    assert "generic" in last
