"""Collective operations of a run in several processes, one per device.

Every process runs the same program on its share of the images; after each step all processes hold the same
weights. A step runs one backward pass per level, and the gradients of all levels meet in the shared weights,
which are exchanged once, however many levels there are (`nestify/training/exchange.py`). PyTorch's wrappers
do not fit that:

- DistributedDataParallel averages during the backward pass, and expects one backward pass per step that
  reaches every parameter, but here each level has its own, and private tensors get a gradient only from
  theirs. It counts all processes alike, however many images each had. With gradient checkpointing the levels
  run outside its `forward`, so it exchanges no gradients and reports no error. It would also broadcast all
  buffers before each step, entry levels included.
- FSDP2 replaces the parameters of a block when the block runs, and so overwrites the tensors of the level
  that `functional_call` has put there: the logits are those of another network, again without an error.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from nestify.errors import NestifyError, ProcessError
from nestify.model.nested_model import NestedModel

T = TypeVar("T")


class PendingSum:
    """The sums of tensors over all processes, in one flat tensor that may still be on its way.

    Args:
        flat: this process's numbers; becomes the sums.
        work: what torch.distributed returned.
    """

    def __init__(self, flat: Tensor, work: distributed.Work) -> None:
        self._flat = flat
        self._work: distributed.Work | None = work

    def wait(self) -> Tensor:
        """Return the flat tensor of the sums. On a GPU the host does not wait.

        Raises:
            ProcessError: if another process has ended.
        """
        if self._work is not None:
            with collective():
                self._work.wait()
            self._work = None
        return self._flat

    def copy_to(self, tensors: Sequence[Tensor]) -> None:
        """Write the sums into tensors of the shapes that were summed; counts are left out."""
        sums = self.wait()
        sizes = [tensor.numel() for tensor in tensors]
        parts = sums[: sum(sizes)].split(sizes)
        if tensors:  # a model may have no statistics
            views = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
            torch._foreach_copy_(list(tensors), views)


@dataclass(frozen=True)
class World:
    """The processes of a run, as this process sees them.

    Attributes:
        rank: rank of this process, counted from 0.
        size: number of processes (torch.distributed's world size).
        processors: number of processors for each process, the least of all nodes; None if there is only
            one process.
        exchange: number type in which gradients are exchanged.
        overlap: whether a part of the gradients is exchanged while lower levels still run.
    """

    rank: int = 0
    size: int = 1
    processors: int | None = None
    exchange: torch.dtype = torch.float32
    overlap: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process has rank 0, which writes files and reports progress."""
        return self.rank == 0

    def start_sum(
        self,
        tensors: Sequence[Tensor],
        weight: int,
        counts: Sequence[Tensor] = (),
        dtype: torch.dtype = torch.float32,
    ) -> PendingSum:
        """Start to sum tensors over all processes, weighted by process, and counts, which are not.

        Args:
            tensors: are left unchanged.
            weight: weight of this process; with 0 its tensors may hold any values, NaN included.
            counts: (1,) each.
            dtype: number type of the exchange.
        """
        flat = torch.cat([*(tensor.detach().reshape(-1).to(dtype) for tensor in tensors), *counts])
        weighted = flat[: len(flat) - len(counts)]
        weighted.mul_(weight) if weight else weighted.zero_()
        with collective():
            return PendingSum(flat, distributed.all_reduce(flat, async_op=True))

    def broadcast(self, module: nn.Module) -> None:
        """Copy the parameters and buffers of rank 0 to all processes."""
        state = module.state_dict()  # whose extra state is no tensor of the module's device
        self.broadcast_tensors([tensor for name, tensor in state.items() if "_extra_state" not in name])

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Copy tensors of rank 0 to those of the same shapes in all processes."""
        if self.size > 1:
            with collective():
                for tensor in tensors:
                    if tensor.numel():
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
            with collective():
                distributed.broadcast_object_list(values, 0)
        found: T = values[0]
        return found

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; the values must be small and picklable."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with collective():
            distributed.all_gather_object(values, value)
        return values

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes; the argument is left unchanged."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        with collective():
            distributed.all_reduce(total)
        return total

    def on_main(self, action: Callable[[], T]) -> T:
        """Run a function on rank 0 and return its small, picklable result in all processes.

        Raises:
            NestifyError: what the function raises, in all processes.
            ProcessError: if rank 0 fails in another way.
        """
        return self.everywhere(lambda: action() if self.is_main else None)[0]  # type: ignore[return-value]

    def everywhere(self, action: Callable[[], T]) -> list[T]:
        """Run a function in all processes, and return their small, picklable results by rank.

        No process waits for one whose function has failed.

        Raises:
            NestifyError: what the function raises; in all processes, the one of the lowest rank.
            ProcessError: if another process fails in another way.
        """
        if self.size == 1:
            return [action()]
        result: T | None = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        told = failure
        if failure is not None and not isinstance(failure, NestifyError):
            first = str(failure).strip().partition("\n")[0]
            told = ProcessError(
                f"rank {self.rank} has failed ({type(failure).__name__}: {first}); read its output"
            )
        answers: list[tuple[Any, Exception | None]] = self.all_gather((result, told))
        if failure is not None:
            raise failure
        for _, other in answers:
            if other is not None:
                raise other
        return [value for value, _ in answers]


SINGLE = World()
"""The world of a run that has a single process."""


def current_world() -> World:
    """Return the processes of the process group that a training loop has started, or this one alone."""
    if distributed.is_available() and distributed.is_initialized():
        return World(distributed.get_rank(), distributed.get_world_size())
    return SINGLE


@contextmanager
def collective() -> Iterator[None]:
    """Run a collective operation, which fails if another process has ended.

    Raises:
        ProcessError: if the operation fails.
    """
    try:
        yield
    except (distributed.DistError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise peer_error(error) from error


def is_peer_error(error: BaseException) -> bool:
    """Return whether an exception comes from a collective operation, such as one inside a forward pass."""
    if isinstance(error, distributed.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "by peer"))


def peer_error(error: BaseException) -> ProcessError:
    """Return an error that says in one sentence why processes could not exchange data."""
    text = str(error).strip()
    first = text.partition("\n")[0]
    if "out of memory" in text.lower():
        return ProcessError(
            f"a device has no memory left for the exchange between processes ({first}); use a smaller "
            "--batch-size, and check that no other program or process uses the same GPU"
        )
    if "timed out" in text.lower() or "timeout" in text.lower():
        return ProcessError(
            f"another process of this run has not answered in time ({first}); read its output, and if it "
            "only needs longer, set a larger train.timeout_minutes"
        )
    return ProcessError(
        f"another process of this run has ended ({first}); read its output, and start the run again"
    )
