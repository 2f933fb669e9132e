"""The machine's name, whatever its system tells."""

from pathlib import Path

import pytest
import torch

from nestify.evaluation import machine
from nestify.evaluation.machine import this_machine


def test_this_machine() -> None:
    found = this_machine(torch.device("cpu"))
    assert found.device == "cpu"
    assert found.device_name == found.cpu
    assert found.torch == torch.__version__
    assert found.cores >= 1
    assert found == this_machine(torch.device("cpu"))


def test_the_processors_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("processor\t: 0\nmodel name\t: Some(R)  CPU\x1b[31m @ 2 GHz \nmodel name\t: other\n")
    assert machine._cpu_name(told) == "Some(R) CPU[31m @ 2 GHz"
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    told.write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert machine._cpu_name(told) == "aarch64"
    assert machine._cpu_name(tmp_path / "none") == "aarch64"
