"""What runs in the worker processes: one image from file to tensor, and one batch of them.

timm replaces an image that it cannot read by the next one. Here it becomes a `Fault` that travels with the
batch to the main process, which knows whether to refuse or to count it.
"""

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from nestify.data.dataset import Images
from nestify.data.normalise import Normalise
from nestify.data.pixels import no_ghostscript, open_image, to_mode
from nestify.errors import DataError


@dataclass(frozen=True)
class Prepare:
    """How an opened image becomes the input of a model.

    Attributes:
        mode: Pillow's mode, such as `RGB`, to which every image is converted.
        upright: whether to apply the EXIF orientation.
        transform: converts such an image to a tensor: uint8 (H, W, C) if it is normalised later.
        normalise: turns a batch of such tensors into float32 (B, C, H, W), on its device; None if `transform`
            returns that of one image.
    """

    mode: str
    upright: bool
    transform: Callable[[Image.Image], Tensor]
    normalise: Normalise | None = None

    def pixels(self, image: Image.Image) -> Image.Image:
        """Return the image in the model's mode, with every pixel decoded."""
        return to_mode(image, self.mode, upright=self.upright)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the tensor of an image."""
        return self.transform(self.pixels(image))


@dataclass(frozen=True)
class Fault:
    """An image of a batch that could not be used.

    Attributes:
        name: name of the image.
        reason: why it could not be used.
        skippable: whether the image itself is damaged (and not its label, or the whole stream).
    """

    name: str
    reason: str
    skippable: bool = True


Target = int | Tensor
"""A class index; or (classes,), float32, 1 for each label of the image, else 0."""

Sample = tuple[Tensor, Target] | Fault
Batch = tuple[list[Tensor] | None, list[Fault]]


class Samples(Dataset[Sample]):
    """Images as tensors (C, H, W) with their target.

    A key is (position in `images.indices`, seed or None). With a seed, random transforms depend only on it,
    not on the worker or on images loaded before.

    Args:
        images: images of a data set with random access.
        prepare: converts an opened image to a tensor.
    """

    def __init__(self, images: Images, prepare: "Prepare") -> None:
        assert images.indices is not None
        self._images = images
        self._indices = images.indices
        self._prepare = prepare

    def __getitem__(self, key: tuple[int, int | None]) -> Sample:
        position, seed = key
        index = int(self._indices[position])
        try:
            image, target = self._read(index)
        except Exception as error:  # Pillow's decoders raise many kinds of exceptions for a damaged file
            return Fault(self._images.file_name(index), first_line_of(error))
        label = target_of(self._images, target)
        if label is None:
            return Fault(self._images.file_name(index), f"its label is {target!r}", skippable=False)
        try:
            with nullcontext() if seed is None else seed_generators(seed):
                return self._prepare.transform(image), label
        except Exception as error:  # timm's transforms, for a size or a range that they cannot produce
            reason = f"it cannot be preprocessed ({first_line_of(error)})"
            return Fault(self._images.file_name(index), reason, skippable=False)

    def _read(self, index: int) -> tuple[Image.Image, Any]:
        """Read an image in the model's mode, with every pixel decoded, and the data set's label."""
        dataset = self._images.dataset
        if not hasattr(dataset, "reader"):  # torchvision
            image, target = dataset[index]
            return self._prepare.pixels(image), target
        file, target = dataset.reader[index]
        with file:
            return self._prepare.pixels(open_image(file)), target


class Stream(IterableDataset[Sample]):
    """Images as tensors (C, H, W) with their target, from a data set that is read sequentially.

    timm divides a training stream among processes so that each gets the same number of images, some of them
    repeatedly. For an evaluation each image must come once: each worker of each process reads shards of its
    own of a webdataset; of other streams a process reads all images, and uses every `world_size`-th.

    Args:
        images: images of a stream, for the classes.
        dataset: timm's data set, opened for the loader's batch size and with its transform.
        rank, world_size: rank of this process, and number of processes that share the images.
        training: whether the images are trained on.
    """

    def __init__(
        self, images: Images, dataset: Any, rank: int = 0, world_size: int = 1, training: bool = True
    ) -> None:
        self._images = images
        self.dataset = dataset
        reader = dataset.reader
        self._own_shards = not training and world_size > 1 and images.source.kind == "wds"
        # timm takes them from the process group, also where every process needs all images
        self._share = slice(None) if training or self._own_shards else slice(rank, None, world_size)
        own = self._share == slice(None)
        reader.dist_rank, reader.dist_num_replicas = (rank, world_size) if own else (0, 1)

    def check_shards(self, workers: int, world_size: int) -> None:
        """Refuse a webdataset with fewer shards than readers, some of which would get no images.

        Raises:
            DataError: if several processes read it, and there are fewer.
        """
        shards = getattr(getattr(self.dataset.reader, "split_info", None), "filenames", None)
        readers = max(1, workers)
        if world_size > 1 and shards is not None and len(shards) < world_size * readers:
            raise DataError(
                f"{self._images.source}: {len(shards)} shards are too few for {world_size} processes with "
                f"{readers} readers each; use a smaller --workers, fewer processes, or more shards"
            )

    def __iter__(self) -> Iterator[Sample]:
        share = self._share
        yield from islice(self._read(), share.start, share.stop, share.step)

    def _read(self) -> Iterator[Sample]:
        name = str(self._images.source)
        try:
            if self._own_shards:
                self.dataset.reader._lazy_init()
                self.dataset.reader.dist_num_replicas = 1  # or it would cut and repeat the shards
            images = iter(self.dataset)
            while True:
                with no_ghostscript():
                    image, target = next(images, (None, None))
                if image is None:
                    return
                label = target_of(self._images, target)
                if label is None:
                    yield Fault(name, f"a label is {target!r}", skippable=False)
                    return
                yield image, label
        except Exception as error:  # network, damaged shard or damaged image: the stream cannot continue
            yield Fault(name, first_line_of(error), skippable=False)


def target_of(images: Images, target: Any) -> Target | None:
    """Return the target of a data set's label; None if it is not a label of these classes.

    Images whose labels are not used have the class index 0.
    """
    if not images.labelled:
        return 0
    if images.multi_label:
        index_of, marked = images.classes.index_of, torch.zeros(images.num_classes or 0)
        marked[[label if index_of is None else index_of[label] for label in target]] = 1
        return marked
    if not isinstance(target, Integral):
        return None
    label = int(target)
    index_of = images.classes.index_of
    if index_of is not None:
        return index_of[label] if 0 <= label < len(index_of) else None
    count = images.num_classes
    return label if label >= 0 and (count is None or label < count) else None


def collate(samples: list[Sample]) -> Batch:
    """Collate the good images (B, C, H, W) and targets (B,) or (B, classes), or None; and list the faults."""
    good = [sample for sample in samples if not isinstance(sample, Fault)]
    faults = [sample for sample in samples if isinstance(sample, Fault)]
    return (default_collate(good) if good else None), faults


def first_line_of(error: Exception) -> str:
    """Return an exception's message as one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that nestify opens"  # its own message names a file object
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def seed_generators(seed: int) -> Iterator[None]:
    """Seed every CPU generator that timm's and torchvision's transforms use, and restore them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU as well
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def init_worker(_: int) -> None:
    """Ignore SIGINT, SIGHUP and SIGUSR1 in a worker, because the main process needs it to end in order.

    SIGTERM keeps torch's handler, by which the main process ends workers when it exits.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class QuietLoader(DataLoader[Any]):
    """torch's loader without its warning about more workers than processors."""

    def check_worker_number_rationality(self) -> None:
        """Do nothing: `machine.workers_warning` says it once for a whole run."""
