"""The exchange of gradients between the processes of a run: at the end of a step, or in pieces before it.

A step runs its levels from the highest to the core level. The gradient of a weight is complete once the
lowest level that uses the weight has run. So the weights can be exchanged in pieces, by entry level: those
that only the highest level uses travel while the other levels compute, and only those of the core level, the
private tensors and the statistics of batch norm are left for the end of the step. PyTorch's buckets follow
the layers instead, and could overlap with nothing but the backward pass of the core level.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nestify.accelerator import HostCopy
from nestify.model.masking import tensor_versions
from nestify.model.nested_model import NestedModel
from nestify.training.distributed import PendingSum, World

STATISTICS = ("running_mean", "running_var")
"""Endings of the names of buffers that hold statistics of the images."""

SAVE = 2**16
"""What a request for a checkpoint adds to the number of processes that were asked to stop."""


def read_requests(sums: HostCopy) -> tuple[bool, bool]:
    """Return whether any process was asked to stop, and whether a checkpoint is due."""
    asked = int(sums.read()[0])
    return asked % SAVE > 0, asked >= SAVE


class GradientExchange:
    """Averages gradients and running statistics over the images of all processes, step by step.

    Every process calls `start`, then `level_done` for each level in the same order, then `finish`. The host
    does not wait for the device, except in a process without images. With `World.overlap`, the indices of the
    pieces take 8 bytes for each weight that has an entry level, and a buffer takes 4.

    Args:
        world: the processes; a single one exchanges nothing.
        nested: the model.
        entry: returns the entry levels of the shared tensors in which levels differ, by state-dict name.
    """

    def __init__(self, world: World, nested: NestedModel, entry: Callable[[], Mapping[str, Tensor]]) -> None:
        self._world, self._nested, self._entry = world, nested, entry
        self._images = 0
        self._levels: tuple[int, ...] = ()
        self._split: dict[str, Tensor] = {}
        self._sent: list[tuple[Tensor, PendingSum]] = []
        self._state: object = None
        self._indices: dict[tuple[int, ...], list[Tensor]] = {}
        self._buffer: Tensor | None = None

    def start(self, levels: Sequence[int], images: int) -> None:
        """Start a step.

        Args:
            levels: the levels that it trains.
            images: number of images of this process, its weight in the averages; 0 if none could be read,
                and its gradients then do not count.
        """
        self._levels = tuple(sorted(levels, reverse=True))
        self._images, self._split, self._sent = images, {}, []

    def level_done(self, level: int) -> None:
        """Start the exchange of the weights that the lower levels of the step do not use.

        Args:
            level: a level whose gradients have been added, in the last batch of the step.
        """
        if self._world.size == 1 or not self._world.overlap or level == self._levels[-1]:
            return
        if not self._split:
            shared = self._nested.shared_tensors()
            self._split = {name: shared[name] for name in self._entry() if shared[name].grad is not None}
        index = self._find_indices()[self._levels.index(level)]
        if len(index):
            self._sent.append((index, self._send([self._gather().index_select(0, index)])))

    def finish(self, stop: bool = False, save: bool = False) -> HostCopy | None:
        """Exchange the rest, and write the averages.

        If gradients are exchanged in 16 bits, the statistics are exchanged apart, in 32 bits.

        Args:
            stop: whether this process was asked to stop.
            save: whether a checkpoint is due; only rank 0 asks for one.

        Returns:
            What the processes ask for, for `read_requests`; None if there is a single process.
        """
        if self._world.size == 1:
            return None
        gradients = [p.grad for p in self._nested.parameters() if p.grad is not None]
        statistics = [b for name, b in self._nested.named_buffers() if name.endswith(STATISTICS)]
        rest = self._take_rest(gradients) if self._sent else gradients
        counts = [gradients[0].new_full((1,), float(n)) for n in (self._images, stop + SAVE * save)]
        if self._world.exchange == torch.float32:
            last = self._world.start_sum([*rest, *statistics], self._images, counts)
            sums = [(last, [*rest, *statistics])]
        else:
            last = self._world.start_sum(statistics, self._images, counts)
            sums = [(last, statistics), (self._send(rest), rest)]
        total, requests = last.wait()[-2], last.wait()[-1:]
        if self._images or float(total):
            for pending, tensors in sums:
                pending.copy_to(tensors)
            if self._sent:
                self._join(rest[0])
            torch._foreach_div_([*gradients, *statistics], total)
        else:  # no process has images
            torch._foreach_zero_(gradients)
        self._sent = []
        return HostCopy(requests)

    def _send(self, tensors: Sequence[Tensor]) -> PendingSum:
        return self._world.start_sum(tensors, self._images, dtype=self._world.exchange)

    def _gather(self) -> Tensor:
        """Return the gradients of the split tensors in one tensor, which is used again and again.

        On a CPU, the pages of a new large tensor cost more time than the copy.
        """
        parts = [gradient.reshape(-1) for gradient in self._split_gradients()]
        if self._buffer is None or len(self._buffer) != sum(map(len, parts)):
            self._buffer = torch.cat(parts)
        else:
            torch.cat(parts, out=self._buffer)
        return self._buffer

    def _split_gradients(self) -> list[Tensor]:
        return [tensor.grad for tensor in self._split.values() if tensor.grad is not None]

    def _take_rest(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the last piece of the split gradients, and the other gradients."""
        split = {id(gradient) for gradient in self._split_gradients()}
        last = self._gather().index_select(0, self._find_indices()[-1])
        return [last, *(gradient for gradient in gradients if id(gradient) not in split)]

    def _join(self, last: Tensor) -> None:
        """Write the sums of all pieces into the split gradients."""
        assert self._buffer is not None
        self._buffer.index_copy_(0, self._find_indices()[-1], last)
        for index, pending in self._sent:
            self._buffer.index_copy_(0, index, pending.wait().to(last.dtype))
        gradients = self._split_gradients()
        pieces = self._buffer.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view(g.shape) for p, g in zip(pieces, gradients, strict=True)])

    def _find_indices(self) -> list[Tensor]:
        """Return the indices of the pieces in the flat gradients, for each level of the step."""
        entry = [self._entry()[name] for name in self._split]
        state = tuple(self._split), tensor_versions(entry)
        if self._state != state:
            self._state, self._indices = state, {}
        if self._levels not in self._indices:
            flat = torch.cat([levels.reshape(-1) for levels in entry])
            above = [flat > level for level in self._levels[1:]]
            whole = [*above, torch.ones_like(flat, dtype=torch.bool)]
            parts = [whole[0], *(lower & ~higher for higher, lower in pairwise(whole))]
            self._indices[self._levels] = [part.nonzero().view(-1) for part in parts]
        return self._indices[self._levels]
