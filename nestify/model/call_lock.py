"""A lock for the calls of a model, which is copied and pickled with the model as a new one."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class CallLock:
    """Lets one thread at a time run a model whose tensors are exchanged during a call.

    A thread that holds the lock may take it again.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock in the block; does nothing while torch.compile traces it."""
        if torch.compiler.is_compiling():
            yield
            return
        with self._lock:
            yield

    def __deepcopy__(self, memo: dict[int, Any]) -> "CallLock":
        return CallLock()

    def __reduce__(self) -> tuple[type["CallLock"], tuple[()]]:
        return CallLock, ()
