"""The engine's shared library: where it is, and its C functions."""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from nestify.engine.build import LIBRARY_NAME, BuildError, compile_library, sources_digest
from nestify.errors import SetupError

INTERFACE = 5
"""What `nestify_engine_interface` returns; see native/api.cpp."""

VARIABLE = "NESTIFY_ENGINE_LIBRARY"
"""Environment variable with the path of the library, in place of the installed one."""


def cache_folder() -> Path:
    """Return the folder in which libraries and packed models are cached."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nestify" / "engine"


def built_path() -> Path:
    """Return where `build` puts the library of this version's sources."""
    return cache_folder() / sources_digest() / LIBRARY_NAME


def build() -> Path:
    """Compile the library into the cache folder, and return its path.

    Raises:
        SetupError: if that is not possible.
    """
    try:
        compile_library(path := built_path())
    except BuildError as error:
        raise SetupError(str(error)) from error
    return path


def find_library() -> Path:
    """Return the path of the library: NESTIFY_ENGINE_LIBRARY's, the one in the cache, or the package's.

    The one in the cache was built from these very sources; the package's may be older than they are.

    Raises:
        SetupError: if there is none; the message says how to get it.
    """
    if given := os.environ.get(VARIABLE):
        if not os.path.isfile(given):
            raise SetupError(f"{VARIABLE}={given}: there is no such file; correct the path or unset it")
        return Path(given)
    for path in (built_path(), Path(__file__).parent / LIBRARY_NAME):
        if path.is_file():
            return path
    raise SetupError(
        "the sparse engine's library is not installed; run `nestify engine --build`, which needs a C++ "
        "compiler"
    )


class Library:
    """The C functions of a loaded library.

    Attributes:
        path: path of the library.
        isa: the instruction set that it uses: avx512, avx2, or generic (NEON or SSE2).

    Raises:
        SetupError: on construction, if it cannot be loaded, is of another version, or NESTIFY_ENGINE_ISA is
            not an instruction set of this processor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._functions = ctypes.CDLL(os.fspath(path))
            found = self._functions.nestify_engine_interface()
        except (OSError, AttributeError) as error:
            raise SetupError(
                f"{path}: is not a library of this machine ({error}); run `nestify engine --build`"
            ) from error
        if found != INTERFACE:
            raise SetupError(
                f"{path}: is of another version of nestify; install nestify again, or run `nestify engine "
                "--build`"
            )
        name = ctypes.c_char_p()
        if problem := self.call("nestify_engine_isa", ctypes.byref(name)):
            raise SetupError(problem)
        self.isa = (name.value or b"").decode()

    def call(self, name: str, *arguments: Any) -> str | None:
        """Call a function that returns a sentence about what is wrong, or None.

        Args:
            name: the function.
            arguments: numbers as ctypes values, arrays as pointers.
        """
        function: Callable[..., bytes | None] = getattr(self._functions, name)
        function.restype = ctypes.c_char_p  # type: ignore[attr-defined]
        found = function(*arguments)
        return None if found is None else found.decode()


@cache
def load_library() -> Library:
    """Load the library once per process.

    Raises:
        SetupError: see `find_library` and `Library`.
    """
    return Library(find_library())
