"""Batches for training and evaluation: timm's transforms, in an order given by seed and epoch.

The loaders are torch's, with timm's `create_transform`, because timm's `create_loader` takes neither a
sampler nor a seed, and pads a distributed validation with repeated images. Workers send 8-bit pixels, a
quarter of the bytes, which are normalised on the device that uses them.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader

from nestify.accelerator import is_gpu
from nestify.data.dataset import Images
from nestify.data.normalise import Normalise, split_normalisation
from nestify.data.order import Order
from nestify.data.samples import Batch, Fault, Prepare, QuietLoader, Samples, Stream, collate, init_worker
from nestify.data.source import open_split
from nestify.errors import DataError, RecipeError, foreign_code
from nestify.model.preprocessing import MODES, evaluation_transform, transform_options


class Loader:
    """Batches (images, targets) on a device: float32 (B, C, H, W), normalised, and int64 (B,),
    or float32 (B, labels) for images with several labels.

    Skipped images make a batch smaller. A pass raises `DataError` when an image cannot be read and the
    images say `refuse`, when none can be read, and when a worker process dies.

    Args:
        images: what is loaded.
        loader: torch's loader of it.
        device: where batches are put.
        order: order of the images; None for a stream.
        whole_stream: whether this process reads each image of a stream once.
        min_images: a batch with fewer readable images is left out.
        normalise: turns images into the model's input on the device; None if they are that already.
        keeps_empty: whether an empty batch takes the place of one that is left out, so that several
            processes have the same number of batches.
        may_be_empty: whether a complete pass may have no images, because other processes have some.

    Attributes:
        place: number of batches of the pass that are done, including those before `first_batch` and those
            that are left out.
        left_out: number of batches with fewer readable images than `min_images`.
    """

    def __init__(
        self,
        images: Images,
        loader: DataLoader[Any],
        device: torch.device,
        order: Order | None,
        whole_stream: bool = False,
        min_images: int = 1,
        keeps_empty: bool = False,
        normalise: Normalise | None = None,
        may_be_empty: bool = False,
    ) -> None:
        self.images = images
        self.place = 0
        self.left_out = 0
        self._min_images = min_images
        self._keeps_empty = keeps_empty
        self._may_be_empty = may_be_empty
        self._normalise = normalise
        self._whole_stream = whole_stream
        self._loader = loader
        self.device = device
        self._order = order
        samples: Any = loader.dataset
        self._stream: Any = None if order is not None else samples.dataset

    def __len__(self) -> int:
        """Return the number of batches of a complete pass of this process; an estimate for a stream."""
        # timm rounds a training stream up to whole batches of every worker
        n = len(self._stream) if self._order is None else len(self._order)
        size = self._loader.batch_size or 1
        return n // size if self._loader.drop_last else -(-n // size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, number: int, first_batch: int = 0) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield the batches of one epoch.

        Args:
            number: number of the epoch, from 0, which changes order and augmentation.
            first_batch: index of the first batch, from 0, to resume an interrupted epoch; earlier batches are
                not read, except by a stream.
        """
        if self._order is not None:
            self._order.epoch = number
            self._order.first = first_batch * (self._loader.batch_size or 1)
        else:
            self._stream.set_epoch(number)
        count = 0
        self.place = first_batch if self._order is not None else 0
        with closing(self._batches()) as batches:
            for batch, faults in batches:
                self._record_faults(faults)
                self.place += 1
                images, targets = batch or (torch.empty(0), torch.empty(0, dtype=torch.long))
                count += len(targets)
                if len(targets) < self._min_images:
                    self.left_out += batch is not None and self.place > first_batch
                    if self._keeps_empty and self.place > first_batch:
                        yield images[:0].to(self.device), targets[:0].to(self.device)
                elif self.place > first_batch:
                    images = images.to(self.device, non_blocking=True)
                    images = self._normalise(images) if self._normalise else images
                    yield images, targets.to(self.device, non_blocking=True)
        if not first_batch:
            self._check_count(count)

    def _check_count(self, count: int) -> None:
        """Refuse a complete pass without any image, and an incomplete stream."""
        if not count and not self._may_be_empty:
            raise self.images.unreadable()
        if self._whole_stream:
            self.images.check_delivered(count)

    def _batches(self) -> Generator[Batch]:
        batches, whole = iter(self._loader), False
        try:
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    whole = True
                    return
                except RuntimeError as error:
                    if "DataLoader worker" not in str(error):
                        raise
                    raise DataError(
                        f"{self.images.source}: a worker process died ({error}); memory may be short, so "
                        "use a smaller --workers or --batch-size"
                    ) from error
                yield batch
        finally:
            if not whole:
                # End the workers of a cut pass now. The garbage collector may take the queues apart first,
                # and then every worker takes its five seconds to notice.
                self._loader._iterator = None
                del batches

    def _record_faults(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            if not fault.skippable:
                raise DataError(f"{fault.name}: cannot be used: {fault.reason}")
            if self.images.on_bad_image == "refuse":
                raise DataError(
                    f"{fault.name}: not a readable image ({fault.reason}); replace or remove it, or pass "
                    "--on-bad-image skip"
                )
            self.images.skipped[fault.name] = fault.reason


def train_loader(
    images: Images,
    preprocessing: Mapping[str, Any],
    *,
    batch_size: int,
    workers: int = 0,
    augment: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    min_images: int = 1,
) -> Loader:
    """Make shuffled, augmented batches of one size; the incomplete last batch of an epoch is dropped.

    Args:
        images: the training images.
        preprocessing: the model's preprocessing: `input_size` (channels, height, width), `mean` and `std` per
            channel for pixels in [0, 1], `interpolation`, for evaluation `crop_pct` and `crop_mode`, and
            `exif_orientation`, whether images are turned upright, False if missing.
        batch_size: images per batch of this process.
        workers: number of processes that load images; 0 loads in this process.
        augment: arguments of timm's `create_transform` (`hflip`, `scale`, `ratio`, `color_jitter`,
            `auto_augment`, `re_prob`, `no_aug`, ...); timm's defaults for omitted ones, and the model's
            interpolation. Mixup is applied by the training task.
        seed: together with the epoch, it determines the order and every image's augmentation, for any number
            of workers. For a stream they depend on timm and on the number of workers.
        rank, world_size: rank of this process and number of processes, in distributed training.
        min_images: a batch that has fewer readable images is left out.

    Raises:
        DataError: if there are fewer images than a batch.
        RecipeError: if timm does not accept `augment`.
        UnsupportedModelError: if timm does not accept `preprocessing`.
    """
    mine = len(images) // world_size
    if mine < batch_size and not images.source.is_stream:  # a stream repeats images to fill a batch
        raise DataError(
            f"{images.source}: {mine} training images are fewer than one batch of {batch_size}; use "
            f"--batch-size {max(mine, 1)} or less"
        )
    prepare = _prepare(preprocessing, training=True, augment=augment or {})
    order = None
    if not images.source.is_stream:
        order = Order(len(images), seed, rank, world_size, even=True)
    share = {"rank": rank, "world_size": world_size}
    samples = _samples(images, prepare, batch_size, workers, **share, seed=seed, training=True)
    if isinstance(samples, Stream):
        samples.check_shards(workers, world_size)
    device = torch.device(device)
    loader = _torch_loader(samples, order, batch_size, workers, device, seed=seed, drop_last=True)
    return Loader(images, loader, device, order, False, min_images, world_size > 1, prepare.normalise)


def eval_loader(
    images: Images,
    preprocessing: Mapping[str, Any],
    *,
    batch_size: int,
    workers: int = 0,
    device: torch.device | str = "cpu",
    shuffle_seed: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Make batches with the model's evaluation preprocessing; every image once, the last batch smaller.

    Args:
        shuffle_seed: shuffles the order, for batch statistics, which images sorted by class would distort.
            None for the stored order.
        rank, world_size: the process reads every `world_size`-th image, starting with its rank, or shards of
            its own, of which there may be none; no image is repeated.

    The other arguments and errors are those of `train_loader`.
    """
    prepare = _prepare(preprocessing, training=False, augment={})
    order = None
    if not images.source.is_stream:
        order = Order(len(images), shuffle_seed, rank, world_size, even=False)
    samples = _samples(images, prepare, batch_size, workers, rank=rank, world_size=world_size)
    device = torch.device(device)
    loader = _torch_loader(samples, order, batch_size, workers, device)
    whole_stream = order is None and world_size == 1
    return Loader(
        images,
        loader,
        device,
        order,
        whole_stream,
        normalise=prepare.normalise,
        may_be_empty=world_size > 1,
    )


def _samples(
    images: Images,
    prepare: Prepare,
    batch_size: int,
    workers: int,
    *,
    rank: int,
    world_size: int,
    seed: int = 0,
    training: bool = False,
) -> Samples | Stream:
    if not images.source.is_stream:
        return Samples(images, prepare)
    # tfds/ makes images of this mode itself; the others deliver them as stored
    mode = prepare.mode if images.source.kind == "tfds" else ""
    options: dict[str, Any] = {
        "is_training": training,
        "batch_size": batch_size,
        "seed": seed,
        "input_img_mode": mode,
    }
    dataset = open_split(images.source, **options)
    dataset.transform = prepare
    stream = Stream(images, dataset, rank, world_size, training)
    dataset.set_loader_cfg(num_workers=workers)
    return stream


def _torch_loader(
    samples: Samples | Stream,
    order: Order | None,
    batch_size: int,
    workers: int,
    device: torch.device,
    *,
    seed: int = 0,
    drop_last: bool = False,
) -> DataLoader[Any]:
    return QuietLoader(
        samples,
        batch_size=batch_size,
        sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=is_gpu(device),
        drop_last=drop_last,
        worker_init_fn=init_worker,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed),  # so that a pass leaves the global one alone
    )


def _prepare(preprocessing: Mapping[str, Any], *, training: bool, augment: Mapping[str, Any]) -> Prepare:
    """Return how images become the model's input: timm's transform, in the mode of the model's channels."""
    mode = MODES[transform_options(preprocessing)["input_size"][0]]
    plain = evaluation_transform(preprocessing)
    upright = bool(preprocessing.get("exif_orientation", False))
    if not training:
        return Prepare(mode, upright, *split_normalisation(plain))
    refused = f"timm does not accept the augmentation {dict(augment)}"
    with foreign_code(lambda reason: RecipeError(f"{refused}: {reason}")):
        augmented = create_transform(**{**transform_options(preprocessing), **augment}, is_training=True)
    return Prepare(mode, upright, *split_normalisation(augmented))


class Pictures:
    """The images of a loader without their labels, for any number of passes."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Tensor]:
        return (images for images, _ in self.loader)
