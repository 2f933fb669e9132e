"""The order in which a data set is read, given by seed and epoch."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class Order(Sampler[tuple[int, int | None]]):
    """The keys of one epoch for `Samples`, which depend only on seed, epoch and rank.

    Args:
        n: number of images.
        seed: shuffles, and seeds each image's augmentation; None for the stored order without seeds.
        rank, world_size: the process reads every `world_size`-th image, starting with its rank.
        even: whether all ranks get the same number of images, leaving out the last few.
    """

    def __init__(self, n: int, seed: int | None, rank: int, world_size: int, even: bool) -> None:
        self.epoch = 0
        self.first = 0
        self._n, self._seed, self._rank, self._world_size = n, seed, rank, world_size
        self._end = n - n % world_size if even else n

    def __len__(self) -> int:
        return len(range(self._rank, self._end, self._world_size))

    def __iter__(self) -> Iterator[tuple[int, int | None]]:
        mine = slice(self._rank, self._end, self._world_size)
        if self._seed is None:
            for position in range(self._n)[mine][self.first :]:
                yield position, None
            return
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self._n, generator=generator)[mine][self.first :]
        seeds = torch.randint(2**32, (self._n,), generator=generator)[order]
        yield from zip(order.tolist(), seeds.tolist(), strict=True)
