"""Make the embedded digits images nestify/recipes/digits/{train,validation}.tar, with identical bytes.

    pip install scikit-learn
    python recipes/make_digits.py [OUTPUT_FOLDER]

The images are part of scikit-learn, so nothing is downloaded. SOURCE.md next to the archives describes them.
"""

import argparse
import io
import random
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

EMBEDDED = Path(__file__).parent.parent / "nestify" / "recipes" / "digits"
VALIDATION_SHARE = 0.2
SEED = 0


def png(levels: np.ndarray) -> bytes:
    """Return an 8-bit grey PNG of grey values 0..16, shape (8, 8).

    `level * 255 // 16` gives 17 different values, so no information is lost. The pixels are not compressed,
    because compressed bytes differ between zlib versions, and a tar rounds up to 512 bytes anyway.
    """
    file = io.BytesIO()
    Image.fromarray((levels.astype(np.int64) * 255 // 16).astype(np.uint8)).save(
        file, "PNG", compress_level=0
    )
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """Write files, sorted by name, with headers that do not depend on the time or the user."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(members):
            info = tarfile.TarInfo(name)  # mtime, uid and gid are 0, mode is 0644
            info.size = len(members[name])
            tar.addfile(info, io.BytesIO(members[name]))


def main(folder: Path) -> None:
    """Write both archives to a folder."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    split: dict[str, dict[str, bytes]] = {"train": {}, "validation": {}}
    rng = random.Random(SEED)
    for digit in range(10):
        rows = [int(row) for row in np.flatnonzero(digits.target == digit)]
        validation = set(rng.sample(rows, round(len(rows) * VALIDATION_SHARE)))
        for row in rows:
            members = split["validation" if row in validation else "train"]
            members[f"{digit}/{row:04d}.png"] = png(digits.images[row])
    for name, members in split.items():
        write_tar(folder / f"{name}.tar", members)
        print(f"{folder / name}.tar: {len(members)} images", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=EMBEDDED, help="where to write")
    main(parser.parse_args().folder)
