"""Batches of jobs that do nothing, quickly."""

from pathlib import Path

import pytest

from tests.compression.batch.builders import Fakes, write_fake_file


@pytest.fixture(scope="session")
def fake_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_file(tmp_path_factory.mktemp("fake") / "fake.nested.safetensors")


@pytest.fixture
def fakes(tmp_path: Path, fake_file: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """Batches in a folder of their own, whose jobs do what their models are called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    trace = tmp_path / "trace"
    trace.touch()
    monkeypatch.setenv("FAKE_TRACE", str(trace))
    monkeypatch.setenv("FAKE_FILE", str(fake_file))
    return Fakes(tmp_path, trace)
