"""What a nested file says of a finished run."""

import os
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nestify.compression import Compressed
from nestify.evaluation.accuracy import Accuracy
from nestify.fingerprint import fingerprint
from nestify.levels import Level
from nestify.model_spec import ModelSpec
from nestify.nested_file.manifest import (
    Description,
    LevelDescription,
    Metrics,
    ModelEntry,
    Preprocessing,
)
from nestify.planning import level_cost
from nestify.recipe import Recipe


def describe_run(recipe: Recipe, done: Compressed) -> Description:
    """The description that goes into a nested file.

    Args:
        recipe: what was asked for.
        done: what came out.
    """
    nested = done.nested
    before = {result.level: result.top1 for result in done.before}
    after = {result.level: result for result in done.after}
    return Description(
        model=_model_entry(nested.spec, done.class_names),
        schedule=recipe.schedule.kind,
        levels=[
            _level(done, level, k, after.get(k), before.get(k))
            for k, level in enumerate(recipe.levels, start=1)
        ],
        original=_original(done.original),
        recipe=_without_folders(recipe.to_dict()),
        seed=recipe.seed,
        versions={name: version(name) for name in ("nestify", "torch", "timm")},
        source_sha256=done.pretrained.source_sha256,
    )


def _without_folders(options: dict[str, Any]) -> dict[str, Any]:
    """A recipe's options, local files and folders by name alone: a file need not tell where they lay."""
    places = [("data", "path"), ("data", "root"), ("model", "checkpoint")]
    places += [("train", "teacher_checkpoint"), ("finetune", "save")]
    for section, key in places:
        value = options[section][key]
        if value is not None and os.path.isabs(value):
            options[section][key] = Path(value).name
    if options["output"] is not None:
        options["output"] = Path(options["output"]).name
    return options


def _model_entry(spec: ModelSpec, class_names: Sequence[str] | None) -> ModelEntry:
    prepared = spec.preprocessing
    return ModelEntry(
        architecture=spec.architecture,
        kwargs=spec.kwargs,
        num_classes=spec.num_classes,
        preprocessing=Preprocessing(
            input_size=spec.input_size,
            mean=list(prepared["mean"]),
            std=list(prepared["std"]),
            interpolation=prepared["interpolation"],
            crop_pct=float(prepared["crop_pct"]),
            crop_mode=prepared["crop_mode"],
        ),
        class_names=None if class_names is None else list(class_names),
    )


def _level(
    done: Compressed, level: Level, k: int, after: Accuracy | None, top1_before: float | None
) -> LevelDescription:
    nested = done.nested
    cost = level_cost(nested, k, done.count)
    return LevelDescription(
        name=level.name,
        sparsity=level.sparsity,
        width=level.width,
        achieved_sparsity=cost.sparsity,
        pattern=str(level.pattern),
        fingerprint=fingerprint(partial(nested, level=k), nested.spec.input_size),
        metrics=Metrics(
            parameters=cost.parameters,
            nonzero_parameters=cost.nonzero_parameters,
            dense_macs=cost.dense_macs,
            effective_macs=cost.effective_macs,
            uncounted=dict(done.count.uncounted),
            top1=None if after is None else after.top1,
            top5=None if after is None else after.top5,
            loss=None if after is None else after.loss,
            images=None if after is None else after.images,
            top1_before=top1_before,
        ),
        layers=list(cost.layers),
    )


def _original(original: Accuracy | None) -> dict[str, float]:
    if original is None:
        return {}
    return {"top1": original.top1, "top5": original.top5, "loss": original.loss}
