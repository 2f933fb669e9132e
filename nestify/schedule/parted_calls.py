"""The layers of a network on images in parts, which join where the layers ahead leave room in memory.

The first layers of a network for images have the largest feature maps. They run on the first part of the
images alone; the next part starts when less room is needed, and catches up with the layers that the first one
has passed, with their weights as they are by then.
"""

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import accumulate, islice

import torch
from torch import Tensor, nn

from nestify.machine import release_memory
from nestify.schedule.layer_calls import LayerCall, layer_calls

FEWEST = 8
"""Images in a part, from which batch norm can take statistics."""


class PartedCalls:
    """Runs a network on parts of images, one layer at a time.

    Args:
        network: the network, in eval mode.
        parts: images (B, C, H, W) of each part.
        batch_statistics: whether batch norm normalises by the statistics of a part.

    Attributes:
        calls: the call of the current layer on each part that has joined; empty before the first and after
            the last layer.
        passed: number of layers, the current one included.
    """

    def __init__(self, network: nn.Module, parts: Sequence[Tensor], *, batch_statistics: bool) -> None:
        self._network, self._parts, self._batch_statistics = network, parts, batch_statistics
        self._runs: list[Generator[LayerCall, None, None]] = []
        self.calls: list[LayerCall] = []
        self.passed = 0
        self.join()

    @property
    def images(self) -> int:
        """Number of images of the parts that have joined."""
        return sum(len(part) for part in self._parts[: len(self._runs)])

    @property
    def next_part(self) -> int:
        """Number of images of the part that joins next; 0 if all have joined."""
        return len(self._parts[len(self._runs)]) if len(self._runs) < len(self._parts) else 0

    def join(self) -> None:
        """Let the next part run up to the current layer."""
        run = layer_calls(
            self._network, self._parts[len(self._runs)], batch_statistics=self._batch_statistics
        )
        self._runs.append(run)
        self.calls.extend(deque(islice(run, self.passed), maxlen=1))  # the call of the current layer
        if len(self._runs) > 1:
            release_memory()

    def advance(self) -> bool:
        """Go to the next layer, and return whether there is one."""
        self.calls.clear()  # what the last layer read is free before the next one runs
        for run in self._runs:
            if (call := next(run, None)) is not None:
                self.calls.append(call)
        self.passed += 1
        return bool(self.calls)

    def close(self) -> None:
        """End the runs."""
        self.calls.clear()
        for run in self._runs:
            run.close()


@torch.no_grad()
def images_ahead(network: nn.Module, image: Tensor, numbers: int) -> list[int]:
    """Return for each layer how many images may have joined, so that no layer from there on reads more.

    Args:
        network: the network, in eval mode.
        image: one image (1, C, H, W).
        numbers: largest number of inputs of a layer.
    """
    with closing(layer_calls(network, image, batch_statistics=False)) as calls:
        sizes = [call.inputs.numel() for call in calls]
    return [numbers // max(1, largest) for largest in accumulate(reversed(sizes), max)][::-1]


def part_images(images: Tensor, first: int) -> list[Tensor]:
    """Divide images (B, C, H, W) into parts of `first` images or `FEWEST`; the last may have a few more."""
    size = max(FEWEST, first)
    count = max(1, len(images) // size + (len(images) % size >= FEWEST))
    return [images[k * size : (k + 1) * size if k < count - 1 else None] for k in range(count)]
