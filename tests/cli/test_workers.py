"""More worker processes than processors: nestify warns, and torch does not repeat the warning."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.driver import QUICK, nestify

ONE = "data.workers = 2 is more than the processors that this process may use (1)"


@pytest.fixture
def _one_processor() -> Iterator[None]:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs a system that binds processes")
    usual = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usual)})
    yield
    os.sched_setaffinity(0, usual)


@pytest.mark.usefixtures("_one_processor")
@pytest.mark.parametrize("command", [pytest.param("compress", marks=pytest.mark.long), "eval"])
def test_only_nestify_warns(command: str, digits_file: Path, digits_folder: Path) -> None:
    words = {
        "compress": ("compress", "digits", *QUICK),
        "eval": ("eval", digits_file, "--data", digits_folder),
    }
    done = nestify(*words[command], "--workers", "2")
    assert done.code == 0, done.err  # a warning of torch would be an error in this process
    said = [line for line in done.err.splitlines() if ONE in line]
    assert said
    assert all("--workers 1" in line for line in said)
    assert "DataLoader" not in done.err


def test_no_warning_for_as_many_workers_as_processors(digits_file: Path, digits_folder: Path) -> None:
    done = nestify("eval", digits_file, "--data", digits_folder, "--workers", "1")
    assert (done.code, done.err) == (0, "")
