"""The identity of a run: everything that must be the same for a run to resume from a checkpoint."""

import hashlib
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import timm
import torch
from torch import nn

from nestify.addresses import hide_passwords_in
from nestify.data.dataset import Images
from nestify.data.hierarchy import ClassLevels
from nestify.recipe.flat_options import flat_options, is_free
from nestify.recipe.recipe import Recipe
from nestify.version import __version__

Identity = dict[str, Any]
"""Everything that a run's result depends on: numbers, texts and hashes, by a name that users understand."""


def run_identity(
    recipe: Recipe,
    device: torch.device,
    network: nn.Module,
    teacher: nn.Module | None,
    images: Mapping[str, Images],
    labels: ClassLevels,
    processes: int = 1,
) -> Identity:
    """Return everything that a run's result depends on.

    Args:
        recipe: the recipe of the run.
        device: the device that trains; only its type matters.
        network: the model with its pretrained weights.
        teacher: the teacher, if it is a model of its own; otherwise None.
        images: the images by split.
        labels: the classes that each level predicts.
        processes: number of processes that share a step's images.
    """
    identity: Identity = {
        "the version of nestify": __version__,
        "the version of torch": torch.__version__,
        "the version of timm": timm.__version__,
        "the kind of device": device.type,
        "the number of processes": processes,
        **{key: hide_passwords_in(value) for key, value in flat_options(recipe) if not is_free(key)},
        "the hash of the model's weights": _hash_of_weights(network),
        "the hash of the hierarchy": _hash(classes.model_dump_json() for classes in labels.hierarchy),
        "the hash of the teacher's weights": None if teacher is None else _hash_of_weights(teacher),
    }
    for split, each in images.items():
        identity[f"the number of {split} images"] = len(each)
        identity[f"the hash of the names of the {split} images"] = _hash(each.inner_names())
        if each.multi_label:
            identity[f"the hash of the labels of the {split} images"] = _hash(map(str, each.label_rows()))
        identity[f"the hash of the classes of the {split} images"] = _hash(each.class_names or ())
    return identity


def find_difference(
    old: Identity,
    new: Identity,
    sentence: str = "{key} is {new} now and was {old} when the run began",
) -> str | None:
    """Return the first difference between two runs as a main clause, or None if there is no difference.

    Args:
        old: identity of one run.
        new: identity of another run.
        sentence: the clause, with {key}, {old} and {new}.
    """
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key) != new.get(key):
            return sentence.format(key=key, old=_shorten(old.get(key)), new=_shorten(new.get(key)))
    return None


def _shorten(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _hash_of_weights(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    remaining = iter(texts)
    while part := list(islice(remaining, 10_000)):  # many at once, for millions of names
        digest.update(("\0".join(part) + "\0").encode(errors="surrogateescape"))
    return digest.hexdigest()
