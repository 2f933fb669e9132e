"""Compiles the sparse engine's library if there is a C++ compiler; the rest is in pyproject.toml."""

import os
import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
BUILD = runpy.run_path(str(ROOT / "nestify" / "engine" / "build.py"))
TARGET = BUILD["chosen_target"]()


class BuildLibrary(build_ext):
    """Builds a plain shared library, which no Python imports."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the library's path below the folder that is built."""
        return os.path.join(*fullname.split(".")[:-1], TARGET.library_name)

    def build_extension(self, ext: Extension) -> None:
        """Compile the library; without a compiler the installation goes on, because it is optional."""
        try:
            BUILD["compile_library"](Path(self.get_ext_fullpath(ext.name)), TARGET)
        except BUILD["BuildError"] as error:
            raise CompileError(f"{error}; nestify works without it, except for its sparse engine") from error


class Wheel(bdist_wheel):
    """A wheel for every Python 3 of a platform, or for all platforms if it holds no library."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, ABI and platform."""
        _, _, platform = super().get_tag()
        has_library = any(Path(self.bdist_dir).rglob(TARGET.library_name))
        return "py3", "none", (TARGET.wheel_tag or platform) if has_library else "any"


setup(
    ext_modules=[
        Extension(
            "nestify.engine.library_",
            sources=[str(path.relative_to(ROOT)) for path in BUILD["sources"]()],
            optional=BUILD["TARGET_VARIABLE"] not in os.environ,  # a wheel for a platform must have it
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
