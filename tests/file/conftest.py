from pathlib import Path

import pytest

from nestify.file.writer import write_nested_file
from tests.file.builders import description, small_state


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    """Write a nested file of three levels, about 7 kB."""
    path = tmp_path / "small.safetensors"
    write_nested_file(path, small_state(), description(3))
    return path
