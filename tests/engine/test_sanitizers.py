"""Damaged layers on a library with the address and undefined-behaviour sanitizers, which end the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nestify.engine.build import FLAGS, BuildError, find_compiler, sources
from nestify.engine.library import VARIABLE

ROOT = Path(__file__).parents[2]

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process that uses such a library; sanitizers are loaded before Python is."""
    library = tmp_path_factory.mktemp("sanitized") / "libnestify_engine.so"
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    command = [*compiler, *FLAGS, *SANITIZERS, "-fPIC", *map(str, sources()), "-o", str(library)]
    if subprocess.run(command, check=False).returncode:
        pytest.skip(f"{compiler[0]} has no sanitizers")
    runtime = subprocess.run(
        [*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip(f"{compiler[0]} has no shared libasan.so")
    # Python itself does not free everything when it ends.
    return {**os.environ, VARIABLE: str(library), "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("test_untrusted", "PackedType.float32"),
        ("test_untrusted", "PackedType.float16"),
        ("test_int8_kernels", ""),
    ],
)
def test_damaged_layers(environment: dict[str, str], module: str, arguments: str, isa: str) -> None:
    code = (
        f"from tests.engine.{module} import *\n"
        f"from nestify.exports.target import PackedType\nprint(fuzz(11, 100_000, {arguments}))"
    )
    done = run(code, {**environment, "NESTIFY_ENGINE_ISA": isa})
    if "is not an instruction set of this processor" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 0


@pytest.mark.long
def test_a_write_out_of_bounds_is_noticed(environment: dict[str, str]) -> None:
    code = (
        "from tests.engine.test_int8_kernels import *\n"
        "run_linear_int8(linear_layer(), np.zeros((42, 12), np.uint8), np.zeros((1, 3), np.uint8), Units())"
    )
    assert "heap-buffer-overflow" in run(code, environment).stderr
