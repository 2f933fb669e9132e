"""`nestify doctor`: installed and missing packages, and devices."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

import nestify as package
from nestify.cli import doctor
from nestify.engine import library as libraries
from nestify.engine.library import VARIABLE, load_library
from tests.cli.driver import environment, nestify
from tests.engine.conftest import library_path

__all__ = ["library_path"]  # a fixture


def test_a_machine_where_it_works() -> None:
    done = nestify("doctor")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"nestify {package.__version__}, Python 3.")
    document = nestify("doctor", "--json").document
    assert document["works"]
    versions = {row["name"]: row["version"] for row in document["packages"]}
    assert versions["torch"] == metadata.version("torch")
    assert {"timm", "torchvision", "safetensors", "onnx", "httpx2", "tensorboard"} <= set(versions)
    assert {row["extra"] for row in document["packages"]} == {"", "onnx", "tensorboard"}
    assert document["devices"][0]["name"] == "cpu"
    assert len(document["devices"]) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()


def test_missing_old_and_broken_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"timm": "0.9", "onnx": None}

    def version(name: str) -> str:
        if versions.get(name, "") is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or "99999"

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setitem(doctor._MODULES, "torchvision", "no_such_module")
    done = nestify("doctor")
    assert done.code == 3
    assert done.message == (
        "nestify does not work here: timm (too old), torchvision (broken); see the remedies above"
    )
    assert "timm (nestify): pip install 'timm>=" in done.out
    assert "onnx (onnx): pip install 'nestify[onnx]'" in done.out
    assert "torchvision (nestify): ModuleNotFoundError: No module named 'no_such_module'" in done.out


@pytest.fixture
def engine_library(library_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The engine's library of these sources, which is loaded anew before and after the test."""
    monkeypatch.setenv(VARIABLE, str(library_path))
    load_library.cache_clear()
    yield library_path
    load_library.cache_clear()


def test_the_engine_and_its_instruction_set(engine_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTIFY_ENGINE_ISA", "generic")
    code = "from nestify.cli.app import run; run(['doctor', '--json']); print('\\f'); run(['doctor'])"
    command = [sys.executable, "-c", code]  # the instruction set is chosen once per process
    done = subprocess.run(command, env=environment(COLUMNS="400"), capture_output=True, text=True, check=True)
    document, _, shown = done.stdout.partition("\f")
    engine = json.loads(document)["engine"]
    assert engine == {"library": str(engine_library), "isa": "generic", "remedy": ""}
    assert re.search(rf"ok +generic +{re.escape(str(engine_library))}", shown)


def test_how_to_get_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(libraries, "LIBRARY_NAME", "no_such_library")
    load_library.cache_clear()
    done = nestify("doctor")
    assert (done.code, done.err) == (0, "")
    assert "nestify engine --build" in done.out
    engine = nestify("doctor", "--json").document["engine"]
    assert (engine["library"], engine["isa"]) == ("", "")
    load_library.cache_clear()


def test_without_torch_there_are_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor._MODULES, "torch", "no_such_module")
    found = doctor.diagnose()
    assert found.devices == []
    assert [problem.name for problem in found.problems] == ["torch"]


@pytest.mark.parametrize("kind", ["CUDA", "ROCm"])
def test_a_build_for_gpus_without_a_gpu(kind: str) -> None:
    [advice] = doctor.gpu_build_advice("2.14.0+x", kind, 0, {})
    for part in (kind, "2.14.0+x", "--index-url https://download.pytorch.org/whl/cpu", "1 GB", "5.6 GB"):
        assert part in advice
    [hidden] = doctor.gpu_build_advice("2.14.0", kind, 0, {"CUDA_VISIBLE_DEVICES": ""})
    assert "CUDA_VISIBLE_DEVICES" in hidden
    assert "index-url" not in hidden
    assert doctor.gpu_build_advice("2.14.0", kind, 1, {}) == []


def test_the_cpu_build_needs_no_advice() -> None:
    assert doctor.gpu_build_advice("2.14.0+cpu", "", 0, {}) == []


def test_advice_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    done = nestify("doctor")
    assert (done.code, done.err) == (0, "")
    assert "download.pytorch.org/whl/cpu" in done.out
    assert "download.pytorch.org/whl/cpu" in nestify("doctor", "--json").document["advice"][0]
