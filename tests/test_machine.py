"""The processor's name, whatever its system tells."""

from pathlib import Path

import pytest

from nestify import machine as processor
from nestify.machine import processor_name


def test_the_processors_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("processor\t: 0\nmodel name\t: Some(R)  CPU\x1b[31m @ 2 GHz \nmodel name\t: other\n")
    assert processor_name(told) == "Some(R) CPU[31m @ 2 GHz"
    monkeypatch.setattr(processor.platform, "processor", lambda: "")
    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")
    told.write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert processor_name(told) == "aarch64"
    assert processor_name(tmp_path / "none") == "aarch64"
