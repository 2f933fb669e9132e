"""Compiling the engine's shared library. It imports nothing of nestify, because `setup.py` runs it too."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

NATIVE = Path(__file__).parent / "native"

TARGET_VARIABLE = "NESTIFY_ENGINE_TARGET"
"""Environment variable by which `setup.py` makes a wheel for another platform; see `Target`."""


@dataclass(frozen=True)
class Target:
    """A platform that a wheel is made for.

    Attributes:
        system: its name in `sys.platform`.
        triple: what zig calls it, with the oldest version of its C library or system; "" for this machine.
        wheel_tag: platform tag of its wheels; "" for that of this machine.
    """

    system: str
    triple: str = ""
    wheel_tag: str = ""

    @property
    def library_name(self) -> str:
        """File name of the library."""
        names = {"win32": "nestify_engine.dll", "darwin": "libnestify_engine.dylib"}
        return names.get(self.system, "libnestify_engine.so")


TARGETS = {
    "native": Target(sys.platform),
    "linux-x86_64": Target("linux", "x86_64-linux-gnu.2.28", "manylinux_2_28_x86_64"),
    "linux-aarch64": Target("linux", "aarch64-linux-gnu.2.28", "manylinux_2_28_aarch64"),
    "macos-arm64": Target("darwin", "aarch64-macos.11.0", "macosx_11_0_arm64"),
    "windows-x86_64": Target("win32", "x86_64-windows-gnu", "win_amd64"),
}
"""Platforms of wheels, by the values of NESTIFY_ENGINE_TARGET. All but native need ziglang."""

LIBRARY_NAME = TARGETS["native"].library_name

FLAGS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden"),
    *("-Wno-psabi", "-Wno-unknown-pragmas", "-shared", "-pthread"),
)
"""Every instruction set is chosen in the sources, so that one library runs on all processors of a kind."""

HINT = "install a C++ compiler, with `apt-get install g++` or `pip install ziglang`"


class BuildError(Exception):
    """The library cannot be built; the message says why and what helps."""


def sources() -> list[Path]:
    """Return the C++ files that are compiled, in a fixed order."""
    return sorted(NATIVE.glob("*.cpp"))


def sources_digest() -> str:
    """Return a hash of all files that the library is made of, to recognise a library of other sources."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(path for path in NATIVE.rglob("*") if path.suffix in (".cpp", ".h", ".inc")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def chosen_target() -> Target:
    """Return the platform that NESTIFY_ENGINE_TARGET names; this machine if it is not set.

    Raises:
        BuildError: if there is no such platform.
    """
    name = os.environ.get(TARGET_VARIABLE) or "native"
    if name not in TARGETS:
        raise BuildError(f"{TARGET_VARIABLE}={name} is not one of {', '.join(TARGETS)}")
    return TARGETS[name]


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler: that of the variable CXX, the system's, or ziglang's.

    Raises:
        BuildError: if there is none.
    """
    if given := os.environ.get("CXX"):
        return shlex.split(given)
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    if find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise BuildError(f"there is no C++ compiler; {HINT}")


def _cross_compiler(target: Target) -> list[str]:
    if not find_spec("ziglang"):
        raise BuildError(f"ziglang is needed to compile for {target.triple}; pip install ziglang")
    # Without debugging symbols, which zig adds for Windows as a second file.
    return [sys.executable, "-m", "ziglang", "c++", "-target", target.triple, "-s"]


def compile_library(output: Path, target: Target = TARGETS["native"]) -> None:
    """Compile the library, and move it to its place only if that succeeds.

    Args:
        output: path of the library; its folder is created.
        target: the platform.

    Raises:
        BuildError: if there is no compiler, it fails, or the library cannot be written.
    """
    compiler = _cross_compiler(target) if target.triple else find_compiler()
    flags = [] if target.system == "win32" else ["-fPIC"]
    if target.system == "darwin":  # what a program that links the library looks for
        flags.append(f"-Wl,-install_name,@rpath/{target.library_name}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # zig writes an import library for Windows beside the library, which nobody needs.
        with tempfile.TemporaryDirectory(prefix=".", dir=output.parent) as folder:
            built = Path(folder) / output.name
            command = [*compiler, *FLAGS, *flags, *map(str, sources()), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.splitlines()
                lines = [line for line in lines if "error" in line] or lines
                reason = lines[0].strip()[:300] if lines else f"exit code {done.returncode}"
                raise BuildError(f"{compiler[0]} cannot compile the engine ({reason}); {HINT}, or set CXX")
            os.replace(built, output)
    except OSError as error:
        raise BuildError(
            f"{output}: cannot be built ({error.strerror or error}); {HINT}, or set CXX"
        ) from error
