"""Training on several processes, one per device, as torchrun starts them.

Every process runs the same program on its share of the images; after each step they all hold the same.
Gradients are averaged once per step, when all levels have added theirs. torch's DistributedDataParallel
averages while a backward runs, and expects one per step that reaches every parameter; here each level has one
of its own.
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

from nestify.errors import ProcessError, RecipeError
from nestify.model.nested_model import NestedModel

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: of this one, from 0. `size`: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.rank == 0

    def average(self, nested: nn.Module, images: int, stop: bool) -> bool:
        """Average gradients, and running statistics, over the images of all processes, in one exchange.

        Args:
            nested: its parameters have gradients of the mean loss over this process's images.
            images: how many these were.
            stop: whether this process was asked to stop.

        Returns:
            Whether any was.
        """
        if self.size == 1:
            return stop
        shared = [parameter.grad for parameter in nested.parameters() if parameter.grad is not None]
        shared += [b for name, b in nested.named_buffers() if name.endswith(("running_mean", "running_var"))]
        told = torch.tensor([1.0, float(stop) / images], device=shared[0].device)
        flat = torch.cat([*(tensor.detach().reshape(-1).float() for tensor in shared), told]).mul_(images)
        with _connected():
            distributed.all_reduce(flat)
        flat[:-2] /= flat[-2]
        for tensor, mean in zip(shared, flat.split([*(t.numel() for t in shared), 2]), strict=False):
            tensor.detach().copy_(mean.view_as(tensor))
        return bool(flat[-1] > 0)

    def copy_first(self, module: nn.Module) -> None:
        """Let all processes have the first one's parameters and buffers."""
        if self.size > 1:
            with _connected():
                for tensor in module.state_dict().values():
                    distributed.broadcast(tensor, 0)

    def agree(self, nested: NestedModel) -> None:
        """Let all processes have the first one's entry levels, and make sure that they do.

        Raises:
            ProcessError: if they differ nevertheless.
        """
        if self.size == 1:
            return
        self.copy_first(nested.entry)
        digest = hashlib.sha256()
        for name, entry in nested.entry.items():
            digest.update(name.encode())
            digest.update(entry.cpu().numpy().data)
        if len(set(self.gathered(digest.hexdigest()))) > 1:
            raise ProcessError("the processes of this run hold different entry levels; check the machine")

    def first(self, value: T) -> T:
        """The first process's value of something small, for all."""
        values: list[Any] = [value]
        if self.size > 1:
            with _connected():
                distributed.broadcast_object_list(values, 0)
        found: T = values[0]
        return found

    def gathered(self, value: T) -> list[T]:
        """Every process's value of something small, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _connected():
            distributed.all_gather_object(values, value)
        return values

    def summed(self, tensor: Tensor) -> Tensor:
        """A tensor added up over the processes."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        with _connected():
            distributed.all_reduce(total)
        return total


ALONE = World()


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """The processes that torchrun started, for as long as the block lasts; this one alone without torchrun.

    Args:
        device: of the recipe; several processes take a GPU each.

    Raises:
        RecipeError: if there are more processes than devices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(), device
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda" and local >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise RecipeError(
            f"device = cuda: there are {count} GPUs for {local + 1} or more processes; start no more than "
            f"torchrun --nproc-per-node {count}"
        )
    with _connected():
        found = init_distributed_device_so(device.type)
    try:
        yield World(found["global_rank"], found["world_size"]), torch.device(found["device"])
    finally:
        distributed.destroy_process_group()


@contextmanager
def _connected() -> Iterator[None]:
    """An exchange with the other processes; fails where one of them has ended.

    Raises:
        ProcessError: in that case.
    """
    try:
        yield
    except (distributed.DistError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ProcessError(
            f"another process of this run has ended ({first}); see what it says, and start the run again"
        ) from error
