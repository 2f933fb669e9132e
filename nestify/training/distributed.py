"""Training in several processes, one per device, started by torchrun.

Every process runs the same program on its share of the images; after each step all processes hold the same
weights. Gradients are averaged once per step, after the backward passes of all levels. torch's
DistributedDataParallel is not used: it averages during the backward pass, and expects one backward pass per
step that reaches every parameter, but here each level has its own.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor, distributed, nn

from nestify.accelerator import gpu_count, is_gpu
from nestify.errors import ProcessError, RecipeError
from nestify.model.nested_model import NestedModel

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, as this process sees them.

    Attributes:
        rank: rank of this process, counted from 0.
        size: number of processes (torch.distributed's world size).
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process has rank 0, which writes files and reports progress."""
        return self.rank == 0

    def average(self, nested: nn.Module, images: int, stop: bool) -> bool:
        """Average gradients and running statistics over the images of all processes, in one all-reduce.

        Args:
            nested: the model; its gradients are those of the mean loss over this process's images.
            images: number of these images, the weight of this process in the average.
            stop: whether this process was asked to stop.

        Returns:
            Whether any process was asked to stop.
        """
        if self.size == 1:
            return stop
        shared = [parameter.grad for parameter in nested.parameters() if parameter.grad is not None]
        shared += [b for name, b in nested.named_buffers() if name.endswith(("running_mean", "running_var"))]
        # After the all-reduce: the number of images, and the number of processes that were asked to stop.
        counts = torch.tensor([1.0, float(stop) / images], device=shared[0].device)
        flat = torch.cat([*(tensor.detach().reshape(-1).float() for tensor in shared), counts]).mul_(images)
        with _collective():
            distributed.all_reduce(flat)
        flat[:-2] /= flat[-2]
        for tensor, mean in zip(shared, flat.split([*(t.numel() for t in shared), 2]), strict=False):
            tensor.detach().copy_(mean.view_as(tensor))
        return bool(flat[-1] > 0)

    def broadcast(self, module: nn.Module) -> None:
        """Copy the parameters and buffers of rank 0 to all processes."""
        if self.size > 1:
            with _collective():
                for tensor in module.state_dict().values():
                    distributed.broadcast(tensor, 0)

    def sync_entry_levels(self, nested: NestedModel) -> None:
        """Broadcast the entry levels of rank 0, and check that all processes then hold the same ones.

        Raises:
            ProcessError: if the entry levels still differ.
        """
        if self.size == 1:
            return
        self.broadcast(nested.entry)
        digest = hashlib.sha256()
        for name, entry in nested.entry.items():
            digest.update(name.encode())
            digest.update(entry.cpu().numpy().data)
        if len(set(self.all_gather(digest.hexdigest()))) > 1:
            raise ProcessError(
                "the processes of this run hold different entry levels after a broadcast; check the hardware"
            )

    def broadcast_object(self, value: T) -> T:
        """Return the value that rank 0 passes, in all processes; the value must be small and picklable."""
        values: list[Any] = [value]
        if self.size > 1:
            with _collective():
                distributed.broadcast_object_list(values, 0)
        found: T = values[0]
        return found

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; the values must be small and picklable."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _collective():
            distributed.all_gather_object(values, value)
        return values

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes; the argument is left unchanged."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        with _collective():
            distributed.all_reduce(total)
        return total


SINGLE = World()
"""The world of a run that has a single process."""


@contextmanager
def join_process_group(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """Join the process group of the processes that torchrun started, until the end of the block.

    Without torchrun the run has a single process, and no process group is made.

    Args:
        device: the recipe's device; for GPUs, each of several processes gets a GPU of its own.

    Yields:
        The processes of the run, and the device of this process.

    Raises:
        RecipeError: if there are more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(), device
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if is_gpu(device) and local >= (count := gpu_count()):
        raise RecipeError(
            f"device = {device.type}: there are {count} GPUs for {local + 1} or more processes; use torchrun "
            f"--nproc-per-node {count} or fewer"
        )
    with _collective():
        found = init_distributed_device_so(device.type)
    try:
        yield World(found["global_rank"], found["world_size"]), torch.device(found["device"])
    finally:
        distributed.destroy_process_group()


@contextmanager
def _collective() -> Iterator[None]:
    """Run a collective operation, which fails if another process has ended.

    Raises:
        ProcessError: if the operation fails.
    """
    try:
        yield
    except (distributed.DistError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ProcessError(
            f"another process of this run has ended ({first}); read its output, and start the run again"
        ) from error
