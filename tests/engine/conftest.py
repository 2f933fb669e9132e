"""The engine's library, compiled once for all tests of a run; without a compiler they are skipped."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nestify.engine import library as libraries
from nestify.engine.build import LIBRARY_NAME, BuildError, compile_library, find_compiler, sources_digest
from nestify.engine.library import VARIABLE, Library, load_library


@pytest.fixture(scope="session")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of these sources. Its folder is shared by the processes of a parallel run."""
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    installed = Path(libraries.__file__).with_name(LIBRARY_NAME)
    sources = [*installed.with_name("native").rglob("*"), installed.with_name("build.py")]
    if installed.is_file() and installed.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return installed  # an editable install has compiled it
    path = tmp_path_factory.getbasetemp().parent / f"engine-{sources_digest()}" / LIBRARY_NAME
    if not path.is_file():
        compile_library(path)
    return path


@pytest.fixture(scope="session")
def library(library_path: Path) -> Iterator[Library]:
    """That library, as the one that every function of the engine uses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(library_path))
        load_library.cache_clear()
        yield libraries.load_library()
    load_library.cache_clear()
