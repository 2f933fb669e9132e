"""The name of the processor, on systems that report its model or not, and memory that is given back."""

import os
import platform
from pathlib import Path
from threading import Thread

import pytest

from nestify import machine
from nestify.machine import processor_name, release_memory


def test_processor_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some(R)  CPU\x1b[31m @ 2 GHz \nmodel name\t: other\n")
    assert processor_name(cpuinfo) == "Some(R) CPU[31m @ 2 GHz"
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    cpuinfo.write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert processor_name(cpuinfo) == "aarch64"
    assert processor_name(tmp_path / "none") == "aarch64"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory by thread")
def test_freed_memory_goes_back_to_the_system() -> None:
    """A thread keeps 100 MB in blocks that are too small to be given back one by one."""
    keeps = []

    def work() -> None:
        blocks = [bytearray(10_000) for _ in range(10_000)]
        keeps.append(bytearray(10_000))  # above the others, so that the heap does not shrink
        blocks.clear()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    thread = Thread(target=work)
    thread.start()
    thread.join()
    before = resident()
    release_memory()
    assert before - resident() > 50e6
