"""A job ends with the batch that began it, also when that was killed and could say nothing.

The batch holds one end of a pipe, which is the job's standard input. The system closes it when the batch is
gone, whatever the reason.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress

LEASH = "NESTIFY_LEASH"
"""Set in a job's environment: its standard input is such a pipe."""

PATIENCE = 120.0
"""Seconds that a job has for its checkpoint once the batch is gone."""


def tie(patience: float = PATIENCE) -> None:
    """End this process as by SIGTERM when its standard input ends, and its whole group if that takes long."""
    threading.Thread(target=_follow, args=(sys.stdin.fileno(), patience), daemon=True).start()


def _follow(handle: int, patience: float) -> None:
    with suppress(OSError):
        while os.read(handle, 1024):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(patience)
    os.killpg(os.getpgrp(), signal.SIGKILL)
