"""The name of the processor, on systems that report its model and on those that do not."""

from pathlib import Path

import pytest

from nestify import machine
from nestify.machine import processor_name


def test_processor_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some(R)  CPU\x1b[31m @ 2 GHz \nmodel name\t: other\n")
    assert processor_name(cpuinfo) == "Some(R) CPU[31m @ 2 GHz"
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    cpuinfo.write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert processor_name(cpuinfo) == "aarch64"
    assert processor_name(tmp_path / "none") == "aarch64"
