"""The keys of a recipe that hold paths. Does not import torch."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

INPUT_FILES = (
    "model.checkpoint",
    "data.labels",
    "data.hierarchy",
    "data.class_names",
    "train.teacher_checkpoint",
    "gates.baseline",
)
"""Files that a run reads; what is in them counts, and not where they are."""

IMAGES = ("data.path", "data.root")
"""Files or folders of images, or data sets by name."""

MODELS = ("model.name", "train.teacher")
"""Models by name, or in a folder: `local-dir:FOLDER`."""

LOCAL_MODEL = "local-dir:"

OUTPUT_FILES = ("output", "finetune.save")
"""Files that a run writes."""

MAY_BE_ELSEWHERE = tuple(key for key in (*INPUT_FILES, *IMAGES) if key.startswith("data."))
"""Paths that are searched in the current folder too, if the recipe's folder has nothing of that name."""


def without_folders(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's options with names in place of the output's path and of absolute paths.

    Args:
        options: all options as plain values, section by section, as `Recipe.to_dict` returns them.
    """
    found = deepcopy(dict(options))
    for key in (*INPUT_FILES, *IMAGES, *MODELS, *OUTPUT_FILES):
        section, _, option = key.rpartition(".")
        values = found[section] if section else found
        if (value := values.get(option)) is None:
            continue
        prefix = LOCAL_MODEL if key in MODELS and value.startswith(LOCAL_MODEL) else ""
        path = Path(value.removeprefix(prefix))
        if path.is_absolute() or key == "output":
            values[option] = f"{prefix}{path.name}"
    return found
