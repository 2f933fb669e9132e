"""The description of a run that goes into its nested file."""

from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain
from math import isfinite
from typing import Any

import torch

from nestify.addresses import hide_passwords_in
from nestify.data.hierarchy import ClassLevels
from nestify.errors import DivergedError
from nestify.evaluation.calibration import Calibration
from nestify.evaluation.measure import Score
from nestify.file.fingerprint import fingerprint_parts
from nestify.file.loading import lazy_level
from nestify.file.manifest import Description, HeldOut, LevelDescription, Metrics, ModelEntry, Preprocessing
from nestify.file.writer import planned_bytes
from nestify.model.nested_model import NestedModel
from nestify.model.spec import ModelSpec
from nestify.recipe.levels import Level
from nestify.recipe.metric import metric_of_run
from nestify.recipe.paths import without_folders
from nestify.recipe.recipe import Recipe
from nestify.schedule.costs import LevelCost

OWN_CLASSES = ClassLevels()
"""All levels predict the data's own classes, which have no names."""

TYPICAL = {
    "top1": 50 + 1 / 3,
    "top5": 75 + 1 / 3,
    "loss": 1 + 1 / 3,
    "map": 50 + 1 / 3,
    "agreement": 50 + 1 / 3,
    "cosine": 1 / 3,
}
"""Values of a typical length in text, to predict the bytes of a file before they are measured."""


def describe(
    recipe: Recipe,
    levels: Sequence[Level],
    nested: NestedModel,
    costs: Sequence[LevelCost],
    *,
    labels: ClassLevels = OWN_CLASSES,
    source_sha256: str | None = None,
    original: Score | None = None,
    before: Sequence[Score] = (),
    after: Sequence[Score] = (),
    calibration: Calibration | None = None,
    held_out: HeldOut | None = None,
    fingerprints: bool = True,
) -> Description:
    """Make the description that goes into a nested file.

    Args:
        recipe: the recipe of the run.
        levels: its levels, core first, with their budgets solved.
        nested: the resulting model.
        costs: costs of its levels, core first.
        labels: the classes that each level predicts.
        source_sha256: hexadecimal SHA-256 of the checkpoint file; None without a file.
        original: accuracy of the dense model; None if it was not evaluated.
        before: accuracies of the levels before training; empty if they were not evaluated.
        after: accuracies of the levels after training; empty if they were not evaluated.
        calibration: temperatures and consensus weights fitted after training; None if they were not fitted.
        held_out: how the validation images were held out of the training images; None if they were not.
        fingerprints: whether to compute each level's logits; with False they are zeros.
    """
    untrained = {result.level: result for result in before}
    trained = {result.level: result for result in after}
    described = [
        _level(nested, level, k, labels, cost, trained.get(k), untrained.get(k), fingerprints)
        for k, (level, cost) in enumerate(zip(levels, costs, strict=True), start=1)
    ]
    if calibration is not None:
        fitted = zip(described, calibration.temperatures, calibration.weights, strict=True)
        described = [
            level.model_copy(update={"temperature": temperature, "consensus": list(weights)})
            for level, temperature, weights in fitted
        ]
    return Description(
        model=_model_entry(nested.spec, labels.class_names, recipe.schedule.keep_outputs),
        hierarchy=list(labels.hierarchy),
        schedule=recipe.schedule.kind,
        levels=described,
        original=_original(original),
        recipe=_recorded(recipe),
        seed=recipe.seed,
        versions={name: version(name) for name in ("nestify", "torch", "timm")},
        source_sha256=source_sha256,
        held_out=held_out,
    )


def block_units(nested: NestedModel, levels: Sequence[Level]) -> dict[str, tuple[int, int]]:
    """Return the blocks in which entry levels are constant, by weight: (rows, cols); empty without blocks."""
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
    held_out: HeldOut | None = None,
) -> list[int]:
    """Predict the bytes of the nested file up to and including each level, core first, header included.

    The sizes are those of the model's current entry levels. Values that are not known yet (accuracies,
    logits, hashes) count with a typical length.

    Args:
        recipe: the recipe of the run.
        levels: its levels, core first, with their budgets solved.
        nested: the nested model.
        costs: costs of its levels, core first.
        labels: the classes that each level predicts.
        held_out: how the validation images were held out of the training images; None if they were not.
    """
    plain = describe(recipe, levels, nested, costs, labels=labels, held_out=held_out, fingerprints=False)
    metric = metric_of_run(recipe.data, nested.spec.output == "logits")
    expected: dict[str, float] = {"images": 10_000, f"{metric.key}_before": 1 / 3}
    expected |= {name: TYPICAL[name] for name in metric.values}
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


def _recorded(recipe: Recipe) -> dict[str, Any]:
    """Return the options that the file holds: without folders of absolute paths, and without passwords."""
    return {name: hide_passwords_in(value) for name, value in without_folders(recipe.to_dict()).items()}


def _model_entry(spec: ModelSpec, class_names: Sequence[str] | None, keep_outputs: bool) -> ModelEntry:
    prepared = spec.preprocessing
    return ModelEntry(
        architecture=spec.architecture,
        kwargs=spec.kwargs,
        num_classes=spec.num_classes,
        channels_last=spec.channels_last,
        feature_reductions=list(spec.reductions),
        keep_outputs=keep_outputs,
        preprocessing=Preprocessing(
            input_size=spec.input_size,
            mean=list(prepared["mean"]),
            std=list(prepared["std"]),
            interpolation=prepared["interpolation"],
            crop_pct=float(prepared["crop_pct"]),
            crop_mode=prepared["crop_mode"],
            exif_orientation=prepared.get("exif_orientation", False),
        ),
        class_names=None if class_names is None else list(class_names),
    )


def _level(
    nested: NestedModel,
    level: Level,
    k: int,
    labels: ClassLevels,
    cost: LevelCost,
    after: Score | None,
    before: Score | None,
    fingerprints: bool,
) -> LevelDescription:
    spec = nested.spec
    outputs = [[0.0] * nested.classes[k - 1]]
    if fingerprints or spec.output != "logits":
        outputs = fingerprint_parts(lazy_level(nested, k), spec.input_size, spec.channels_last)
    if not all(map(isfinite, chain.from_iterable(outputs))):
        raise DivergedError(
            f"level {k} ({level.name}) returns values that are not finite for an image of random pixels; its "
            "weights have diverged, or are too large for their type: train with a smaller learning rate"
        )
    return LevelDescription(
        name=level.name,
        sparsity=level.sparsity,
        width=level.width,
        depth=level.depth,
        classes=labels.class_sets(nested.n_levels)[k - 1],
        skipped=[] if nested.level_sizes is None else nested.level_sizes.skipped_in_order()[k - 1],
        achieved_sparsity=cost.sparsity,
        pattern=str(level.pattern),
        fingerprint=list(chain.from_iterable(outputs)),
        feature_channels=[] if spec.output == "logits" else list(map(len, outputs)),
        metrics=Metrics(
            parameters=cost.parameters,
            nonzero_parameters=cost.nonzero_parameters,
            dense_macs=cost.dense_macs,
            effective_macs=cost.effective_macs,
            uncounted=dict(cost.uncounted),
            **_measured(after, before),
        ),
        layers=list(cost.layers),
    )


def _measured(after: Score | None, before: Score | None) -> dict[str, Any]:
    """Return the fields of `Metrics` that were measured after and before training."""
    found: dict[str, Any] = {}
    if before is not None:
        found[f"{before.metric.key}_before"] = getattr(before, before.metric.key)
    if after is not None:
        found |= {name: getattr(after, name) for name in (*after.metric.values, "images")}
    return found


def _original(original: Score | None) -> dict[str, float]:
    """Return what was measured of the original model; nothing where the levels are compared with it."""
    if original is None or original.metric.is_comparison:
        return {}
    return {name: getattr(original, name) for name in original.metric.values}
