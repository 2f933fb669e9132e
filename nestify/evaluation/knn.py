"""k-NN accuracy of the levels of a nested file: how well features without a classifier separate classes."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nestify.accelerator import pick_device
from nestify.data.dataset import Images, open_splits
from nestify.data.loaders import eval_loader
from nestify.data.source import locate_split
from nestify.errors import DataError
from nestify.evaluation.class_counts import Passes
from nestify.file.loading import load_level
from nestify.file.reader import open_nested_file
from nestify.machine import pick_workers
from nestify.model.outputs import OutputKind
from nestify.recipe.options import USUAL_HOLDOUT, OnBadImage
from nestify.terminal import Progress, shown_progress

NEIGHBOURS = 20
"""Number of images that vote on the class of one."""

TEMPERATURE = 0.07
"""A vote counts exp(cosine similarity / temperature), as in Caron et al., "Emerging Properties in
Self-Supervised Vision Transformers", 2021, section 4.1 and its code."""

CHUNK = 1024
"""Images whose similarities to all others are in memory at the same time."""

Kind = Literal["pre-logits", "embedding", "logits"]


@dataclass(frozen=True)
class KnnAccuracy:
    """k-NN accuracy of one level.

    Attributes:
        level: number of the level, from 1.
        name: name of the level.
        knn: share in percent of the images whose class their neighbours predict.
        features: what images are compared by: `pre-logits`, the input of the classifier; `embedding`, what a
            model without a classifier returns; or `logits`, where the input of the classifier cannot be
            reached.
    """

    level: int
    name: str
    knn: float
    features: Kind


@dataclass(frozen=True)
class KnnEvaluation:
    """k-NN accuracy of levels of a file.

    Attributes:
        path: the file.
        data: the labelled images, as given.
        levels: the accuracy of each level.
        neighbours: number of images that vote on the class of one.
        voting: number of images that vote.
        images: number of images whose class is predicted.
        held_out: whether these were held out of the first, for lack of a validation split.
        skipped: why images could not be read, by file name.
    """

    path: str
    data: str
    levels: list[KnnAccuracy]
    neighbours: int
    voting: int
    images: int
    held_out: bool
    skipped: dict[str, str]


def evaluate_knn(
    path: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    level: int | str = "all",
    data_root: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
    max_images: int | None = None,
    on_bad_image: OnBadImage = "refuse",
    seed: int = 42,
    progress: Progress | None = None,
) -> KnnEvaluation:
    """Predict the classes of validation images by a vote of the most similar training images.

    The classes are those of the images, and need not be the model's.

    Args:
        path: the nested file, or its address.
        data: labelled images with splits, as for `compress`. Without a validation split, every tenth image of
            each class is held out.
        level: number or name of a level, or `all`.
        data_root: folder of a named data set.
        batch_size: images per forward pass.
        workers: number of processes that load images; None chooses.
        device: device to compute on; `auto` chooses.
        max_images: maximum number of images of each split, balanced over the classes.
        on_bad_image: whether to `refuse` or `skip` an unreadable image.
        seed: seed of the choice of images.
        progress: called after each batch with the number of images that were read, and their total.

    Raises:
        NestifyError: if the file or the images are not right, or there is no such level.
    """
    data = os.fspath(data)
    file = open_nested_file(path, truncated=True)
    numbers = range(1, file.n_levels + 1) if level == "all" else [file.level_index(str(level))]
    file.check_whole(max(numbers))
    where = pick_device(device)
    held_out = _lacks_validation(data, data_root)
    train, validation = open_splits(
        data,
        holdout=USUAL_HOLDOUT if held_out else None,
        data_root=data_root,
        on_bad_image=on_bad_image,
        max_images=max_images,
        max_validation_images=max_images,
        seed=seed,
    )
    found = []
    with shown_progress(progress, "images") as advance:
        passes = Passes((len(train) + len(validation)) * len(numbers), advance)
        for number in numbers:
            network = load_level(file, number).to(where)
            features, kind = feature_network(network, file.manifest.model.output)

            def collect(
                images: Images, compute: Callable[[Tensor], Tensor] = features
            ) -> tuple[Tensor, Tensor]:
                loader = eval_loader(
                    images,
                    file.manifest.model.preprocessing.model_dump(),
                    batch_size=batch_size,
                    workers=pick_workers(workers, where),
                    device=where,
                )
                return _collect(compute, passes.watch_batches(loader))

            (bank, labels), (queries, target) = collect(train), collect(validation)
            right = (predict_by_neighbours(queries, bank, labels) == target).double().mean()
            name = file.manifest.levels[number - 1].name
            found.append(KnnAccuracy(number, name, 100 * float(right), kind))
    return KnnEvaluation(
        path=file.name,
        data=data,
        levels=found,
        neighbours=min(NEIGHBOURS, len(labels)),
        voting=len(labels),
        images=len(target),
        held_out=held_out,
        skipped={**train.skipped, **validation.skipped},
    )


def _lacks_validation(data: str, data_root: str | None) -> bool:
    try:
        validation = locate_split(data, "validation", data_root)
    except DataError:
        return True
    return locate_split(data, "train", data_root).overlaps(validation)


@torch.no_grad()
def _collect(compute: Callable[[Tensor], Tensor], batches: Any) -> tuple[Tensor, Tensor]:
    """Return the normalised features (N, D) and the labels (N,) of all images, on the CPU."""
    features, labels = [], []
    for images, target in batches:
        features.append(functional.normalize(compute(images).float().flatten(1), dim=1).cpu())
        labels.append(target.cpu())
    return torch.cat(features), torch.cat(labels)


def feature_network(
    network: nn.Module, output: OutputKind = "logits"
) -> tuple[Callable[[Tensor], Tensor], Kind]:
    """Return a function from images (B, C, H, W) to the features of a level, (B, D), and their kind.

    They are the embedding that it returns, or else timm's pre-logits. A level that is narrower or shallower
    is a traced network without timm's methods; its logits are used.
    """
    module: Any = network
    if output == "embedding":
        return module, output
    if not (hasattr(module, "forward_features") and hasattr(module, "forward_head")):
        return module, "logits"
    return lambda images: module.forward_head(module.forward_features(images), pre_logits=True), "pre-logits"


def predict_by_neighbours(
    queries: Tensor, bank: Tensor, labels: Tensor, k: int = NEIGHBOURS, temperature: float = TEMPERATURE
) -> Tensor:
    """Return the class of each image by a weighted vote of its most similar images.

    Args:
        queries: normalised features of the images, (N, D).
        bank: normalised features of the images that vote, (M, D).
        labels: classes of the images that vote, (M,), int64.
        k: number of votes.
        temperature: a vote counts exp(similarity / temperature).

    Returns:
        Classes, (N,).
    """
    classes, found = int(labels.max()) + 1, []
    for chunk in queries.split(CHUNK):
        similarity, nearest = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
        # softmax keeps the ratios of the votes
        votes = torch.zeros(len(chunk), classes, dtype=chunk.dtype)
        votes.scatter_add_(1, labels[nearest], (similarity / temperature).softmax(1))
        found.append(votes.argmax(1))
    return torch.cat(found)
