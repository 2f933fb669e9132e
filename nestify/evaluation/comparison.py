"""What the levels of a nested file are judged by on given images, and what they are compared with."""

import os
from collections.abc import Mapping, Sequence

from nestify.data.loaders import Loader
from nestify.errors import CheckpointError, RecipeError
from nestify.evaluation.consensus import Network
from nestify.file.loading import load_level
from nestify.file.reader import NestedFile
from nestify.model.pretrained import load_pretrained
from nestify.recipe.metric import AGREEMENT, COSINE, MAP, TOP1, Metric, metric_of


def choose_metric(
    file: NestedFile,
    levels: Sequence[int],
    what: str,
    *,
    labels: str | None,
    unlabelled: bool,
    options: Mapping[str, object],
) -> Metric:
    """Return what levels are judged by.

    Args:
        file: the nested file.
        levels: numbers of the levels.
        what: what the caller is about to do, for messages.
        labels: table of the labels of each image; None if an image has one class.
        unlabelled: whether labels are not read.
        options: values of the options that need one class per image, by flag.

    Raises:
        RecipeError: if the file's levels cannot be judged by it, or an option was given that does not fit.
    """
    given = [flag for flag, value in options.items() if value]
    if labels is not None and unlabelled:
        raise RecipeError(f"--labels {labels} and --unlabelled exclude each other; leave one of them out")
    if given and unlabelled:
        raise RecipeError(f"{' and '.join(given)} needs labels; leave it out, or leave out --unlabelled")
    if given and labels is not None:
        raise RecipeError(
            f"{' and '.join(given)} needs one class per image; leave it out, or leave out --labels"
        )
    multi_label = metric_of(file.manifest.levels[-1].metrics) is MAP
    if unlabelled:
        if multi_label:
            raise RecipeError(
                f"{file.name}: its levels predict several labels per image, and have no class to agree on; "
                "give the labels with --labels in place of --unlabelled"
            )
        return AGREEMENT if file.manifest.model.output == "logits" else COSINE
    file.check_classifies(what, "compare them with the full level (--unlabelled), or ")
    if labels is not None:
        for level in levels:
            if name := file.manifest.levels[level - 1].classes:
                raise RecipeError(
                    f"level {level} of {file.name} predicts coarser classes ({name}), for which --labels has "
                    "no column; choose others with --level"
                )
        return MAP
    if multi_label:
        raise RecipeError(
            f"{file.name}: its levels predict several labels per image, which class folders do not have; "
            "give a CSV table of them with --labels"
        )
    return TOP1


def check_comparable(file: NestedFile, levels: Sequence[int]) -> None:
    """Check that levels can be compared with the full level.

    Args:
        file: the nested file.
        levels: numbers of the levels.

    Raises:
        RecipeError: if a level predicts other classes, or returns fewer channels.
    """
    full = file.manifest.levels[-1]
    for level in levels:
        entry = file.manifest.levels[level - 1]
        if name := entry.classes:
            raise RecipeError(
                f"level {level} of {file.name} predicts coarser classes ({name}), which cannot be compared "
                "with the full level's; choose others with --level, or evaluate with labels"
            )
        if entry.feature_channels != full.feature_channels:
            raise RecipeError(
                f"level {level} of {file.name} returns {sum(entry.feature_channels)} channels and the full "
                f"level {sum(full.feature_channels)}, which cannot be compared; choose others with --level, "
                "or nest the model with schedule.keep_outputs"
            )


def open_reference(file: NestedFile, original: str | os.PathLike[str] | None, loader: Loader) -> Network:
    """Return the network that levels are compared with."""
    if original is None:
        return load_level(file, file.n_levels).to(loader.device)
    model = file.manifest.model
    loaded = load_pretrained(
        model.architecture,
        checkpoint=os.fspath(original),
        kwargs=model.kwargs,
        options=("the file's architecture", "--original"),
    )
    if loaded.spec.num_classes != model.num_classes:
        raise CheckpointError(
            f"--original {original} predicts {loaded.spec.num_classes} classes, {file.name} "
            f"{model.num_classes}; give the checkpoint that the file was made from"
        )
    return loaded.model.to(loader.device)
