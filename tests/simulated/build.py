"""Compiles the simulated accelerator, once for each version of its source and of torch."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("device.cpp")
CACHE = Path(__file__).with_name("build")


def build_library() -> Path | str:
    """Return the compiled library, or why there is none."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "there is no C++ compiler"
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = CACHE / f"{key}.so"
    if library.exists():
        return library
    CACHE.mkdir(exist_ok=True)
    with _only_one_builds(CACHE / f"{key}.lock"):
        return library if library.exists() else _compile(compiler, library)


def _compile(compiler: str, library: Path) -> Path | str:
    root = Path(torch.__file__).parent
    include = [root / "include", root / "include/torch/csrc/api/include"]
    abi = int(torch.compiled_with_cxx11_abi())
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        made = Path(folder) / "made.so"
        command = [
            *(compiler, "-shared", "-fPIC", "-std=c++20", "-O0", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"),
            *(word for path in include for word in ("-isystem", str(path))),
            *(str(SOURCE), "-o", str(made), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{compiler} does not compile it against torch {torch.__version__}: {done.stderr[:1000]}"
        made.replace(library)
    return library


class _only_one_builds:
    """A lock between the processes of the test run; the system releases it if a process is killed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")

    def __enter__(self) -> None:
        import fcntl

        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._file.close()
