"""Batches of images that a training loop of the user's own gives to nestify."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from nestify.errors import RecipeError
from nestify.training.distributed import World

Batch = Tensor | Sequence[Any]
"""Images (B, C, H, W), or a sequence that starts with them."""


def pictures_of(batches: Iterable[Batch], channels: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the images of batches in float32 on a device.

    Args:
        batches: the batches.
        channels: number of channels that the model reads.
        device: where the images go.

    Raises:
        RecipeError: if a batch is something else, or its images cannot be those that the model reads.
    """
    for batch in batches:
        images = batch[0] if isinstance(batch, Sequence) and batch else batch
        if not isinstance(images, Tensor):
            raise _bad_batch(f"a batch is of the type {_type_name(batch)}")
        if images.ndim != 4 or images.shape[1] != channels:
            found = f"a batch has the shape {tuple(images.shape)}"
            raise _bad_batch(f"{found}, and the model reads {channels} channels")
        if not images.is_floating_point():
            kind = str(images.dtype).removeprefix("torch.")
            raise _bad_batch(f"a batch is of {kind}, so it is not preprocessed")
        yield images.to(device, torch.float32)


def _type_name(batch: object) -> str:
    inside = f" of {type(batch[0]).__name__}" if isinstance(batch, Sequence) and batch else ""
    return type(batch).__name__ + inside


def _bad_batch(found: str) -> RecipeError:
    return RecipeError(
        f"images: {found}; give an iterable of batches, such as a DataLoader, each of them preprocessed "
        "images (B, C, H, W) of a floating-point type, or a tuple or list that starts with them"
    )


def readable_again(batches: Iterable[Batch], most: int) -> Iterable[Batch]:
    """Return the batches, or if they are an iterator, which can be read once, a list of its first ones."""
    return list(islice(batches, most)) if iter(batches) is batches else batches


@dataclass(frozen=True)
class SamePictures:
    """The images of rank 0 in all processes, so that what is measured on them is the same.

    All processes iterate over them in step, as often as they like.

    Attributes:
        batches: the batches of this process; see `pictures_of`.
        channels: number of channels that the model reads.
        world: the processes.
        device: where the images go.
    """

    batches: Iterable[Batch]
    channels: int
    world: World
    device: torch.device

    def __iter__(self) -> Iterator[Tensor]:
        pictures = pictures_of(self.batches, self.channels, self.device)
        if self.world.size == 1:
            yield from pictures
            return
        read: list[Tensor] = []

        def read_batch() -> tuple[int, ...] | None:
            read[:] = islice(pictures, 1)
            return tuple(read[0].shape) if read else None

        while (shape := self.world.on_main(read_batch)) is not None:
            images = read[0].contiguous() if self.world.is_main else torch.empty(shape, device=self.device)
            self.world.broadcast_tensors([images])
            yield images
