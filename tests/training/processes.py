"""Runs of several processes, forked from this one, which is faster than starting Python again for each."""

import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Processes:
    """Processes that call the same function, in the environment of srun.

    Args:
        size: their number.
        function: what each calls with its rank.
        environment: further variables.
    """

    def __init__(
        self, size: int, function: Callable[[int], Any], environment: Mapping[str, str] = {}
    ) -> None:
        self.folder = Path(tempfile.mkdtemp())
        port, self.ids = free_port(), []
        for rank in range(size):
            sys.stdout.flush()
            sys.stderr.flush()
            child = os.fork()
            if child:
                self.ids.append(child)
                continue
            os.environ.update(
                SLURM_PROCID=str(rank),
                SLURM_LOCALID=str(rank),
                SLURM_STEP_NUM_TASKS=str(size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                **environment,
            )
            code = 0
            try:
                result: Any = function(rank)
            except BaseException as error:
                traceback.print_exc()
                result, code = error, 1
            partial = self.folder / f"{rank}.tmp"
            try:
                partial.write_bytes(pickle.dumps(result))
            except Exception:
                partial.write_bytes(pickle.dumps(repr(result)))
            partial.rename(self.folder / str(rank))
            os._exit(code)

    def join(self, seconds: float = 240) -> list[Any]:
        """Wait, and return what each process returned or raised; None for one that was killed.

        Raises:
            TimeoutError: if a process does not end; all are killed then.
        """
        waiting, end = set(self.ids), time.monotonic() + seconds
        while waiting:
            waiting -= {child for child in waiting if os.waitpid(child, os.WNOHANG)[0]}
            if waiting and time.monotonic() > end:
                for child in waiting:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                raise TimeoutError(f"{len(waiting)} of {len(self.ids)} processes did not end")
            time.sleep(0.05)
        files = [self.folder / str(rank) for rank in range(len(self.ids))]
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]
