"""What a nested file says of a run."""

import os
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nestify.data.hierarchy import ClassLevels
from nestify.evaluation.accuracy import Accuracy
from nestify.evaluation.calibration import Calibration
from nestify.file.loading import logit_fingerprint
from nestify.file.manifest import Description, LevelDescription, Metrics, ModelEntry, Preprocessing
from nestify.file.writer import planned_bytes
from nestify.model.nested_model import NestedModel
from nestify.model.spec import ModelSpec
from nestify.recipe.levels import Level
from nestify.recipe.recipe import Recipe
from nestify.schedule.costs import LevelCost

NO_NAMES = ClassLevels()


def describe(
    recipe: Recipe,
    levels: Sequence[Level],
    nested: NestedModel,
    costs: Sequence[LevelCost],
    *,
    labels: ClassLevels = NO_NAMES,
    source_sha256: str | None = None,
    original: Accuracy | None = None,
    before: Sequence[Accuracy] = (),
    after: Sequence[Accuracy] = (),
    calibration: Calibration | None = None,
    fingerprints: bool = True,
) -> Description:
    """The description that goes into a nested file.

    Args:
        recipe: what was asked for. `levels`: the same levels, budgets solved.
        nested: what came out. `costs`: of its levels.
        original: accuracy of the dense model. `before`, `after`: of the levels, without training and with.
        calibration: what was fitted after training; None if nothing was.
        fingerprints: whether to compute each level's logits; zeros stand in for them otherwise.
    """
    untrained = {result.level: result.top1 for result in before}
    trained = {result.level: result for result in after}
    levels_told = [
        _level(nested, level, k, labels, cost, trained.get(k), untrained.get(k), fingerprints)
        for k, (level, cost) in enumerate(zip(levels, costs, strict=True), start=1)
    ]
    if calibration is not None:
        fitted = zip(levels_told, calibration.temperatures, calibration.weights, strict=True)
        levels_told = [
            level.model_copy(update={"temperature": temperature, "consensus": list(weights)})
            for level, temperature, weights in fitted
        ]
    return Description(
        model=_model_entry(nested.spec, labels.class_names),
        hierarchy=list(labels.hierarchy),
        schedule=recipe.schedule.kind,
        levels=levels_told,
        original=_original(original),
        recipe=_without_folders(recipe.to_dict()),
        seed=recipe.seed,
        versions={name: version(name) for name in ("nestify", "torch", "timm")},
        source_sha256=source_sha256,
    )


def block_units(nested: NestedModel, levels: Sequence[Level]) -> dict[str, tuple[int, int]]:
    """Blocks in which the entry levels are constant, by weight."""
    pattern = next((level.pattern for level in levels if level.sparsity > 0), None)
    if pattern is None or pattern.kind != "block":
        return {}
    return dict.fromkeys(nested.entry, (pattern.rows, pattern.cols))


def prefix_bytes(
    recipe: Recipe,
    levels: Sequence[Level],
    nested: NestedModel,
    costs: Sequence[LevelCost],
    labels: ClassLevels,
) -> list[int]:
    """Bytes of the nested file up to and with each level, header included, as the model is now.

    What is not known yet (accuracies, logits, hashes) counts at a typical length.
    """
    plain = describe(recipe, levels, nested, costs, labels=labels, fingerprints=False)
    expected = {
        "top1": 50 + 1 / 3,
        "top5": 75 + 1 / 3,
        "loss": 1 + 1 / 3,
        "images": 10_000,
        "top1_before": 10 / 3,
    }
    described = [
        level.model_copy(
            update={
                "fingerprint": [-1 / 3] * len(level.fingerprint),
                "metrics": level.metrics.model_copy(update=expected),
                "temperature": None if recipe.data.calibrate is None else 10 / 9,
                "consensus": [] if recipe.data.calibrate is None else [1 / 3] * k,
            }
        )
        for k, level in enumerate(plain.levels, start=1)
    ]
    state = nested.nested_state(block_units(nested, levels))
    dtype: torch.dtype = getattr(torch, recipe.dtype)
    return planned_bytes(state, plain.model_copy(update={"levels": described}), dtype)


def _without_folders(options: dict[str, Any]) -> dict[str, Any]:
    """A recipe's options, local files and folders by name alone: a file need not tell where they lay."""
    places = [("data", "path"), ("data", "root"), ("data", "hierarchy"), ("model", "checkpoint")]
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
    nested: NestedModel,
    level: Level,
    k: int,
    labels: ClassLevels,
    cost: LevelCost,
    after: Accuracy | None,
    top1_before: float | None,
    fingerprints: bool,
) -> LevelDescription:
    logits = [0.0] * nested.classes[k - 1]
    if fingerprints:
        logits = logit_fingerprint(partial(nested, level=k), nested.spec.input_size)
    return LevelDescription(
        name=level.name,
        sparsity=level.sparsity,
        width=level.width,
        depth=level.depth,
        classes=labels.class_sets(nested.n_levels)[k - 1],
        skipped=[] if nested.level_sizes is None else nested.level_sizes.skipped_in_order()[k - 1],
        achieved_sparsity=cost.sparsity,
        pattern=str(level.pattern),
        fingerprint=logits,
        metrics=Metrics(
            parameters=cost.parameters,
            nonzero_parameters=cost.nonzero_parameters,
            dense_macs=cost.dense_macs,
            effective_macs=cost.effective_macs,
            uncounted=dict(cost.uncounted),
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
