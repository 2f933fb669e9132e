"""Make cifar100/train.tar and cifar100/test.tar: class folders of lossless PNGs.

    python recipes/make_cifar100.py [FOLDER]

torchvision downloads the data set to FOLDER, `cifar100` by default, and verifies it (A. Krizhevsky, "Learning
Multiple Layers of Features from Tiny Images", 2009). cifar100-superclasses.csv next to this script contains
its 20 superclasses.
"""

import argparse
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from torchvision.datasets import CIFAR100


def write_tar(path: Path, images: Iterable[tuple[Image.Image, int]], classes: list[str]) -> None:
    """Write images as CLASS/NUMBER.png, numbered within the data set."""
    with tarfile.open(path, "w") as tar:
        for number, (image, label) in enumerate(images):
            file = io.BytesIO()
            image.save(file, "PNG")
            info = tarfile.TarInfo(f"{classes[label]}/{number:05d}.png")
            info.size = file.tell()
            file.seek(0)
            tar.addfile(info, file)


def main(folder: Path) -> None:
    """Download the data set, and write both archives."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        images = CIFAR100(str(folder), train=split == "train", download=True)
        pairs = (images[number] for number in range(len(images)))
        write_tar(folder / f"{split}.tar", pairs, images.classes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("cifar100"), help="where to write")
    main(parser.parse_args().folder)
