"""The tests of tests/simulated, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "simulated"


def test_the_simulated_device() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(FOLDER)]
    done = subprocess.run(
        command,
        env={**os.environ, "NESTIFY_SIMULATED": "1"},
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
