"""Batches: timm's pixels, a seeded order, bad images, and tars read by several processes."""

import io
import os
import pickle
import random
import signal
import warnings
import zlib
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from nestify.data.dataset import open_images
from nestify.data.loaders import Loader, eval_loader, train_loader
from nestify.data.samples import Prepare, Samples, init_worker
from nestify.errors import DataError, RecipeError, UnsupportedModelError
from tests.data.builders import NO_CHANGE, PREPROCESSING, grey, make_folder, make_tar, png

# what Python 3.12 says of every forked worker
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

WORKERS = pytest.mark.parametrize("workers", [0, 2])
COUNTS = {"cat": 12, "dog": 9}
ALL = [grey(0, i) for i in range(12)] + [grey(1, i) for i in range(9)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", COUNTS)


def greys(batches: Any) -> list[int]:
    return [round(float(image[0, 0, 0]) * 255) for images, _ in batches for image in images]


def photos(root: Path) -> Path:
    """Images with something to see, of several shapes."""
    rng = np.random.default_rng(0)
    for c, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (20 + 7 * i, 30 + 5 * c, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.jpg")
    return root


@WORKERS
@pytest.mark.parametrize("crop_mode", ["center", "border", "squash"])
def test_evaluation_equals_timm(tmp_path: Path, workers: int, crop_mode: str) -> None:
    root = photos(tmp_path)
    config = {
        "input_size": (3, 16, 24),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": crop_mode,
    }
    loader = eval_loader(open_images(str(root)), config, batch_size=3, workers=workers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # timm leaves the files to the garbage collector
        dataset = timm.data.create_dataset("", root=str(root))
        options = {"batch_size": 3, "use_prefetcher": False, "num_workers": 0}
        expected = list(timm.data.create_loader(dataset, **options, **config))
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    for (images, targets), (timm_images, timm_targets) in zip(batches, expected, strict=True):
        assert images.dtype == torch.float32
        assert targets.dtype == torch.int64
        torch.testing.assert_close(images, timm_images, rtol=0, atol=0)
        assert targets.tolist() == timm_targets.tolist()


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "L", "1", "CMYK"])
def test_odd_modes_become_what_the_model_wants(tmp_path: Path, mode: str) -> None:
    image = Image.linear_gradient("L").resize((8, 8)).convert(mode)
    make_folder(tmp_path, {"a": 1, "b": 1})
    path = tmp_path / "a" / ("000.jpg" if mode == "CMYK" else "000.png")
    image.save(path)
    if mode == "CMYK":
        (tmp_path / "a" / "000.png").unlink()
    for channels, wanted in ((3, "RGB"), (1, "L")):
        config = {**PREPROCESSING, "input_size": (channels, 8, 8)}
        (images, _), *_ = eval_loader(open_images(str(tmp_path)), config, batch_size=2)
        pixels = np.asarray(Image.open(path).convert(wanted), np.float32).reshape(8, 8, channels)
        np.testing.assert_allclose(images[0].permute(1, 2, 0), pixels / 255, rtol=1e-6)


def test_palette_with_transparency(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 1, "b": 1})
    palette = Image.linear_gradient("L").resize((8, 8)).convert("P")
    palette.save(tmp_path / "a" / "000.png", transparency=bytes(range(256)))
    assert len(greys(eval_loader(open_images(str(tmp_path)), PREPROCESSING, batch_size=2))) == 2


def test_grey_model_with_statistics_of_rgb(folder: Path) -> None:
    config = {**PREPROCESSING, "input_size": (1, 8, 8), "mean": (0.2, 0.4, 0.6), "std": (0.5, 1.0, 1.5)}
    (images, _), *_ = eval_loader(open_images(str(folder)), config, batch_size=21)
    np.testing.assert_allclose(images[:, 0, 0, 0], np.array(ALL) / 255 - 0.4, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"input_size": (5, 8, 8)}, {"interpolation": "magic"}],
)
def test_preprocessing_that_timm_cannot_do(folder: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError):
        eval_loader(open_images(str(folder)), {**PREPROCESSING, **change}, batch_size=2)


@pytest.mark.parametrize("augment", [{"auto_augment": "magic"}, {"colour_jitter": 1}])
def test_augmentation_that_timm_cannot_do(folder: Path, augment: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="timm does not accept the augmentation"):
        train_loader(open_images(str(folder)), PREPROCESSING, batch_size=2, augment=augment)


def test_training_batches_are_whole(folder: Path) -> None:
    loader = train_loader(open_images(str(folder)), PREPROCESSING, batch_size=8, augment=NO_CHANGE)
    batches = list(loader)
    assert [len(images) for images, _ in batches] == [8, 8]
    assert len(loader) == 2
    assert len(set(greys(batches))) == 16  # no image twice


def test_training_set_smaller_than_a_batch(folder: Path) -> None:
    images = open_images(str(folder))
    with pytest.raises(
        DataError, match="21 training images are fewer than one batch of 32; use --batch-size 21"
    ):
        train_loader(images, PREPROCESSING, batch_size=32)
    with pytest.raises(DataError, match="10 training images are fewer"):
        train_loader(images, PREPROCESSING, batch_size=16, world_size=2)


AUGMENT = {"scale": (0.3, 1.0), "color_jitter": 0.4, "re_prob": 0.5, "re_mode": "pixel", "auto_augment": None}


def epoch(loader: Loader, number: int, first: int = 0) -> list[torch.Tensor]:
    return [images for images, _ in loader.epoch(number, first)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5", "augmix-m5-w4-d2"])
def test_an_epoch_depends_on_seed_and_number_alone(tmp_path: Path, policy: str | None) -> None:
    images = open_images(str(photos(tmp_path)))
    options = {"batch_size": 2, "augment": {**AUGMENT, "auto_augment": policy}}
    here = train_loader(images, PREPROCESSING, seed=1, **options)
    expected = epoch(here, 3)
    random.random(), np.random.random(), torch.rand(1)
    assert equal(epoch(here, 3), expected)
    workers = train_loader(images, PREPROCESSING, seed=1, workers=2, **options)
    epoch(workers, 0)
    assert equal(epoch(workers, 3), expected)  # for any number of workers, whatever came before
    assert equal(epoch(workers, 3, first=2), expected[2:])  # an epoch that goes on in the middle
    assert not equal(epoch(here, 4), expected)
    assert not equal(epoch(train_loader(images, PREPROCESSING, seed=2, **options), 3), expected)


def test_loading_leaves_the_random_generators_alone(folder: Path) -> None:
    loader = train_loader(open_images(str(folder)), PREPROCESSING, batch_size=4, augment=AUGMENT)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.random(), torch.rand(1).item()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    list(loader)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == expected


def test_processes_share_out_training_images(folder: Path) -> None:
    images = open_images(str(folder))
    options = {"batch_size": 1, "augment": NO_CHANGE, "world_size": 2}
    shares = [greys(train_loader(images, PREPROCESSING, rank=rank, **options)) for rank in range(2)]
    assert [len(share) for share in shares] == [10, 10]  # as many on each, or one would wait for the other
    assert not set(shares[0]) & set(shares[1])


def test_processes_share_out_evaluation_images_exactly(folder: Path) -> None:
    images = open_images(str(folder))
    shares = [
        greys(eval_loader(images, PREPROCESSING, batch_size=4, rank=rank, world_size=4)) for rank in range(4)
    ]
    assert sorted(chain(*shares)) == sorted(ALL)  # 21 images over 4 processes, none twice


def test_a_process_may_have_no_share_of_the_evaluation_images(folder: Path) -> None:
    images = open_images(str(folder), max_images=2)
    shares = [
        greys(eval_loader(images, PREPROCESSING, batch_size=4, rank=rank, world_size=3)) for rank in range(3)
    ]
    assert list(map(len, shares)) == [1, 1, 0]


def test_shuffled_evaluation(folder: Path) -> None:
    images = open_images(str(folder))
    shuffled = greys(eval_loader(images, PREPROCESSING, batch_size=4, shuffle_seed=0))
    assert shuffled != ALL
    assert sorted(shuffled) == sorted(ALL)


def huge_png() -> bytes:
    """A PNG that says it has 20000 x 20000 pixels: beyond Pillow's limit against decompression bombs."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = (20000).to_bytes(4) * 2 + bytes([8, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"0"))
        + chunk(b"IEND", b"")
    )


def truncated_jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "JPEG")
    return file.getvalue()[:-500]


BAD = {
    "text": b"this is no image",
    "empty": b"",
    "truncated png": png(7, (64, 64))[:-60],
    "truncated jpeg": truncated_jpeg(),
    "bomb": huge_png(),
}


@WORKERS
@pytest.mark.parametrize("kind", BAD)
def test_bad_image_is_refused(folder: Path, kind: str, workers: int) -> None:
    bad = folder / "cat" / "005.png"
    bad.write_bytes(BAD[kind])
    loader = eval_loader(open_images(str(folder)), PREPROCESSING, batch_size=4, workers=workers)
    with pytest.raises(
        DataError, match=r"cat/005\.png: not a readable image \(.+\); replace or remove it"
    ) as told:
        list(loader)
    assert "\n" not in str(told.value)


@WORKERS
def test_bad_images_are_skipped_and_counted(folder: Path, workers: int) -> None:
    for name, content in zip(("cat/001", "cat/003", "dog/008"), (BAD["text"], BAD["bomb"], b""), strict=True):
        (folder / f"{name}.png").write_bytes(content)
    images = open_images(str(folder), on_bad_image="skip")
    loader = eval_loader(images, PREPROCESSING, batch_size=2, workers=workers)
    good = [g for g in ALL if g not in (grey(0, 1), grey(0, 3), grey(1, 8))]
    for _ in range(2):  # a second pass counts nothing twice
        assert greys(loader) == good
        assert sorted(images.skipped) == [str(folder / f"{n}.png") for n in ("cat/001", "cat/003", "dog/008")]


def test_skipping_whole_batches(folder: Path) -> None:
    for i in range(12):
        (folder / "cat" / f"{i:03d}.png").write_bytes(b"")
    images = open_images(str(folder), on_bad_image="skip")
    assert greys(eval_loader(images, PREPROCESSING, batch_size=3)) == ALL[12:]
    assert len(images.skipped) == 12


def test_no_image_can_be_read(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    images = open_images(str(folder), on_bad_image="skip")
    with pytest.raises(DataError, match="none of its images could be read"):
        list(eval_loader(images, PREPROCESSING, batch_size=4))


@WORKERS
def test_bad_image_in_a_tar(tmp_path: Path, workers: int) -> None:
    path = make_tar(tmp_path / "d.tar", COUNTS)
    content = path.read_bytes()
    first = content.index(b"IDAT")
    path.write_bytes(content[:first] + b"XXXX" + content[first + 4 :])
    loader = eval_loader(open_images(str(path)), PREPROCESSING, batch_size=4, workers=workers)
    with pytest.raises(DataError, match=r"d\.tar:cat/000\.png: not a readable image"):
        list(loader)


@WORKERS
def test_tar(tmp_path: Path, workers: int) -> None:
    images = open_images(str(make_tar(tmp_path / "d.tar", COUNTS)))
    assert greys(eval_loader(images, PREPROCESSING, batch_size=4, workers=workers)) == ALL


@pytest.mark.parametrize("times", [2, pytest.param(5, marks=pytest.mark.long)])
def test_workers_read_a_tar_that_the_parent_reads(tmp_path: Path, times: int) -> None:
    images = open_images(str(make_tar(tmp_path / "d.tar", {"cat": 50, "dog": 50})))
    expected = greys(eval_loader(images, PREPROCESSING, batch_size=4))
    reading = iter(eval_loader(images, PREPROCESSING, batch_size=4))
    next(reading)
    for _ in range(times):
        assert greys(eval_loader(images, PREPROCESSING, batch_size=1, workers=2)) == expected
    reading.close()


def test_samples_of_a_tar_can_be_sent_to_a_spawned_worker(tmp_path: Path) -> None:
    images = open_images(str(make_tar(tmp_path / "d.tar", COUNTS)))
    samples = Samples(images, Prepare("RGB", True, pil_to_tensor))
    image, label = samples[3, None]
    copy = pickle.loads(pickle.dumps(samples))
    copied_image, copied_label = copy[3, None]
    assert torch.equal(copied_image, image)
    assert label == copied_label == 0


def test_worker_that_dies(folder: Path) -> None:
    loader = eval_loader(open_images(str(folder)), PREPROCESSING, batch_size=1, workers=1)
    batches = iter(loader)
    next(batches)
    worker = loader._loader._iterator._workers[0]
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with pytest.raises(DataError, match=r"a worker process died .* use a smaller --workers"):
        greys(batches)


def test_workers_ignore_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        init_worker(0)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu(folder: Path) -> None:
    (images, targets), *_ = eval_loader(open_images(str(folder)), PREPROCESSING, batch_size=21, device="cuda")
    assert images.device.type == targets.device.type == "cuda"
    assert greys([(images, targets)]) == ALL


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_images_are_normalised_as_timm_does_to_the_last_bit(
    channels: int, training: bool, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels.numpy()).save(tmp_path / name / "1.png")
    preprocessing = {
        **PREPROCESSING,
        "input_size": (channels, 32, 32),
        "mean": (0.485, 0.456, 0.406)[:channels],
        "std": (0.229, 0.224, 0.225)[:channels],
        "crop_pct": 1.0,
    }
    images = open_images(str(tmp_path), ".")
    options = {"batch_size": 2}
    loader = (
        train_loader(images, preprocessing, augment={"no_aug": True}, **options)
        if training
        else eval_loader(images, preprocessing, **options)
    )
    [(batch, _)] = list(loader)
    image = Image.fromarray(pixels.numpy()).convert("L" if channels == 1 else "RGB")
    steps = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(preprocessing["mean"], preprocessing["std"])]
    )
    expected = torch.stack([steps(image)] * 2)
    assert torch.equal(batch, expected)
    assert batch.is_contiguous()
