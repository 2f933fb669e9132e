"""The kernels as 64-bit ARM code, run by an emulator where a cross compiler and qemu are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from nestify.engine.build import FLAGS, NATIVE, sources

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR}: apt-get install g++-aarch64-linux-gnu qemu-user",
)
def test_neon(tmp_path: Path) -> None:
    program = tmp_path / "selfcheck"
    flags = [flag for flag in FLAGS if flag != "-shared"]
    files = [path for path in sources() if path.name != "ops.cpp"]  # the operators need ONNX Runtime
    command = [COMPILER, *flags, "-static", f"-I{NATIVE}", Path(__file__).with_name("selfcheck.cpp"), *files]
    subprocess.run([*command, "-o", program], check=True)
    assembly = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", program], capture_output=True, text=True, check=True
    ).stdout
    assert "fmla" in assembly  # NEON's multiply-add of vectors
    assert "sdot" in assembly
    for processor in ("max", "cortex-a53"):  # with and without dot products
        command = [EMULATOR, "-cpu", processor, program]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (processor, done.stdout)
        assert done.stdout.startswith("generic ")
