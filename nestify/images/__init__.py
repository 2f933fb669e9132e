"""The one place where images enter: finding them, checking them, and loading them in batches.

`open_images` and `open_splits` find a data set's images and fit its classes to a model; `train_loader` and
`eval_loader` make batches of them. Reading and augmentation are timm's.
"""

from nestify.images.dataset import Images, open_images, open_splits
from nestify.images.loaders import Loader, Pictures, eval_loader, train_loader

__all__ = [
    "Images",
    "Loader",
    "Pictures",
    "eval_loader",
    "open_images",
    "open_splits",
    "train_loader",
]
