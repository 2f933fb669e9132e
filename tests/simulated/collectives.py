"""A stand-in for gloo and NCCL in one process group.

It takes tensors on the CPU, and of GPUs contiguous tensors of the process's own device alone.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from tests.simulated import NAME

BACKEND = "simccl"


class SimulatedCollectives(distributed.ProcessGroup):
    """Gloo on the memory of the simulated devices.

    Args:
        store, rank, size, timeout: as torch.distributed passes them to a backend.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = distributed.ProcessGroupGloo(store, rank, size, timeout)

    def _on_cpu(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        own = torch.device(NAME, torch.ops.simulated.current_device())
        for tensor in tensors:
            if tensor.is_cpu:
                continue
            if tensor.device != own:
                raise RuntimeError(f"{BACKEND}: a tensor is on {tensor.device}, and the process on {own}")
            if not tensor.is_contiguous():
                raise RuntimeError(f"{BACKEND}: a tensor is not contiguous")
        return [t if t.is_cpu else torch.ops.simulated.cpu_alias(t.detach()) for t in tensors]

    def allreduce(self, tensors: list[Tensor], *options: Any) -> Any:
        return self._gloo.allreduce(self._on_cpu(tensors), *options)

    def broadcast(self, tensors: list[Tensor], *options: Any) -> Any:
        return self._gloo.broadcast(self._on_cpu(tensors), *options)

    def allgather(self, found: list[list[Tensor]], tensors: list[Tensor], *options: Any) -> Any:
        return self._gloo.allgather([self._on_cpu(each) for each in found], self._on_cpu(tensors), *options)

    def barrier(self, *options: Any) -> Any:
        return self._gloo.barrier()

    def size(self) -> int:
        return self._gloo.size()

    def rank(self) -> int:
        return self._gloo.rank()

    def getBackendName(self) -> str:
        return BACKEND

    def shutdown(self) -> None:
        pass


def register_backend() -> None:
    """Let `init_process_group` use this backend for all tensors."""
    distributed.Backend.register_backend(BACKEND, SimulatedCollectives, devices=[NAME])
    original = distributed.init_process_group

    def init_process_group(*_: Any, **options: Any) -> None:
        options["backend"] = BACKEND
        original(**{key: value for key, value in options.items() if key != "device_id"})

    distributed.init_process_group = init_process_group
