"""More worker processes than processors: nestify warns, and torch does not repeat the warning."""

import os
from pathlib import Path

import pytest

from tests.cli.driver import UNTRAINED, finish, nestify, spawn

ONE = "data.workers = 2 is more than the processors that this process may use (1)"


def on_one_processor() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a system that binds processes")
@pytest.mark.parametrize("command", [pytest.param("compress", marks=pytest.mark.long), "eval"])
def test_only_nestify_warns(command: str, digits_file: Path, digits_folder: Path) -> None:
    words = {
        "compress": ("compress", "digits", *UNTRAINED),
        "eval": ("eval", digits_file, "--data", digits_folder),
    }
    done = finish(spawn(*words[command], "--workers", "2", preexec_fn=on_one_processor))
    assert done.code == 0, done.err
    said = [line for line in done.err.splitlines() if ONE in line]
    assert said
    assert all("--workers 1" in line for line in said)
    assert "DataLoader" not in done.err


def test_no_warning_for_as_many_workers_as_processors(digits_file: Path, digits_folder: Path) -> None:
    done = nestify("eval", digits_file, "--data", digits_folder, "--workers", "1")
    assert (done.code, done.err) == (0, "")
