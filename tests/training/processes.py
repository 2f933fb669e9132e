"""Runs of several processes, forked from a server that has imported nestify already."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "nestify.cli.app",
        "nestify.compression.compress",
        "torch.export._trace",  # what a run imports when it maps channels
        "tests.training.test_distributed",
        "tests.training.test_processes",
    ]
)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def srun_environment(size: int) -> dict[str, str]:
    """Return what srun sets for all processes of a run; each has SLURM_PROCID and SLURM_LOCALID besides."""
    return {
        "SLURM_STEP_NUM_TASKS": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }


class Processes:
    """Processes that call the same function, in the environment of srun.

    Args:
        size: their number.
        function: what each calls with its rank and the arguments; a function of a module.
        arguments: further arguments.
    """

    def __init__(self, size: int, function: Callable[..., Any], *arguments: Any) -> None:
        self.folder = Path(tempfile.mkdtemp())
        given = (srun_environment(size), Path.cwd(), self.folder, function, arguments)
        self.processes = [CONTEXT.Process(target=_call, args=(rank, *given)) for rank in range(size)]
        for process in self.processes:
            process.start()

    def join(self, seconds: float = 240) -> list[Any]:
        """Wait, and return what each process returned or raised; None for one that was killed.

        Raises:
            TimeoutError: if a process does not end; all are killed then.
        """
        for process in self.processes:
            process.join(seconds)
        if late := [process for process in self.processes if process.is_alive()]:
            for process in late:
                process.kill()
            raise TimeoutError(f"{len(late)} of {len(self.processes)} processes did not end")
        files = [self.folder / str(rank) for rank in range(len(self.processes))]
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def _call(
    rank: int,
    environment: dict[str, str],
    folder: Path,
    results: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(environment, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
    torch.set_num_threads(1)  # OMP_NUM_THREADS is read when torch is imported
    os.chdir(folder)
    try:
        result = function(rank, *arguments)
    except Exception as error:
        traceback.print_exc()
        result = error
    partial = results / f"{rank}.tmp"
    partial.write_bytes(pickle.dumps(result))
    partial.rename(results / str(rank))
