"""Processor time of loading images, and of opening a large folder, next to timm in one run.

    python tests/benchmarks/reading.py                 # 64 JPEGs of 500 x 375, evaluation and training
    python tests/benchmarks/reading.py --folder 128000 # that many links to one small image, in 1000 classes

Everything runs on one thread of one process, in turns; the 25th percentile of the turns is printed.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader

from nestify.data.dataset import open_images
from nestify.data.loaders import eval_loader, train_loader
from nestify.training.identity import _hash

TURNS = 3
PREPROCESSING = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}
IMAGES, BATCH = 64, 32


def in_turns(actions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the 25th percentile of the seconds of processor time of each action."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(TURNS):
        for name, action in actions.items():
            start = time.process_time()
            action()
            seconds[name].append(time.process_time() - start)
    return {name: float(np.percentile(each, 25)) for name, each in seconds.items()}


def loading(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(IMAGES):
        path = folder / f"c{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 255, (47, 63, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    images = open_images(str(folder), ".")
    theirs = create_dataset("", root=str(folder), split="none", search_split=False)
    given = {
        "input_size": (3, 224, 224),
        "batch_size": BATCH,
        "use_prefetcher": True,
        "num_workers": 0,
        "persistent_workers": False,
        "pin_memory": False,
        "device": torch.device("cpu"),
        "interpolation": "bicubic",
    }
    loaders = {
        "evaluation, nestify": eval_loader(images, PREPROCESSING, batch_size=BATCH),
        "evaluation, timm": create_loader(theirs, is_training=False, crop_pct=0.875, **given),
        "training, nestify": train_loader(images, PREPROCESSING, batch_size=BATCH),
        "training, timm": create_loader(theirs, is_training=True, **given),
    }
    found = in_turns({name: lambda each=each: [None for _ in each] for name, each in loaders.items()})
    for name, seconds in found.items():
        print(f"{name}: {1000 * seconds / IMAGES:.2f} ms per image")


def opening(folder: Path, count: int) -> None:
    image = folder / "one.jpg"
    Image.new("RGB", (32, 32)).save(image)
    root = folder / "images"
    for index in range(count):
        path = root / f"n{index % 1000:08}" / f"{index}.JPEG"
        if index < 1000:
            path.parent.mkdir(parents=True)
        os.symlink(image, path)

    def ours() -> None:
        images = open_images(str(root), ".")
        _hash(images.inner_names())
        next(iter(train_loader(images, PREPROCESSING, batch_size=8).epoch(0)))

    def theirs() -> None:
        dataset = create_dataset("", root=str(root), split="none", search_split=False)
        loader = create_loader(
            dataset,
            input_size=(3, 224, 224),
            batch_size=8,
            is_training=True,
            use_prefetcher=False,
            num_workers=0,
            persistent_workers=False,
        )
        next(iter(loader))

    found = in_turns({"nestify": ours, "timm": theirs})
    for name, seconds in found.items():
        print(f"{name}: {seconds:.2f} s to the first batch of {count} images")
    print(f"ratio: {found['nestify'] / found['timm']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=int, help="number of links to open")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        if arguments.folder:
            opening(Path(name), arguments.folder)
        else:
            loading(Path(name))


if __name__ == "__main__":
    main()
