"""Two processes train together, each on a simulated device of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("weight", "float32", "own", "late"), id="masked", marks=pytest.mark.long),
        pytest.param(("weight", "float32", "own", "early"), id="in pieces"),
        pytest.param(("channel", "bfloat16", "synced", "late"), id="narrower, 16 bits, synced"),
        pytest.param(
            ("combined", "bfloat16", "synced", "early"), id="both, 16 bits, in pieces", marks=pytest.mark.long
        ),
    ],
)
def test_two_processes_on_two_devices_hold_the_same_tensors_and_do_not_wait(
    options: tuple[str, ...], gpu: torch.device, tmp_path: Path
) -> None:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = str(found.getsockname()[1])
    paths = [tmp_path / str(rank) for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.simulated.worker", str(path), *options],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **{"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
                **{"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
            },
        )
        for rank, path in enumerate(paths)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    first, second = map(load_file, paths)
    # Private statistics are averaged as well, but the sums of the losses are each process's own.
    kept = [name for name in first if not name.startswith("state.progress")]
    assert [name for name in kept if not torch.equal(first[name], second[name])] == []
