"""Two processes train together, each on a simulated device of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def test_two_processes_on_two_devices_hold_the_same_tensors(gpu: torch.device, tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = str(found.getsockname()[1])
    paths = [tmp_path / str(rank) for rank in range(2)]
    settings = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulated.worker", *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = map(load_file, paths)
    # Private statistics are averaged as well, but the sums of the losses are each process's own.
    kept = [name for name in first if not name.startswith("state.progress")]
    assert [name for name in kept if not torch.equal(first[name], second[name])] == []
