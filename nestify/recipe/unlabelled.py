"""Options that need labels, and so cannot be used with `data.unlabelled`. Does not import torch."""

from typing import TYPE_CHECKING

from nestify.recipe.metric import MAP, METRICS, Metric, metric_of_run
from nestify.recipe.problems import Problem, format_toml

if TYPE_CHECKING:
    from nestify.recipe.gates import LevelGates
    from nestify.recipe.recipe import Recipe

LABEL_GATES = ("min_top1", "min_map", "max_drop", "max_regression")
"""Limits that are not measured without labels."""


def unlabelled_problems(recipe: "Recipe") -> list[Problem]:
    """Return a problem for each option that does not fit `data.unlabelled`, whichever value that has."""
    if recipe.data.unlabelled:
        return [Problem(key, f"{text} (data.unlabelled = true)") for key, text in _needing_labels(recipe)]
    usual = metric_of_run(recipe.data)
    return [
        Problem(f"{place}.{metric.gate}", f"{place}.{metric.gate} {_when(metric)}, or use {usual.gate}")
        for place, limits in _limits(recipe)
        for metric in METRICS
        if metric is not usual and getattr(limits, metric.gate) is not None
    ]


def _when(metric: Metric) -> str:
    """Return when a metric is measured, as a predicate and a remedy."""
    if metric.is_comparison:
        return "is measured only without labels; set data.unlabelled = true"
    if metric is MAP:
        return "is measured only with several labels per image; set data.labels to a CSV table"
    return "is measured only with one class per image; leave data.labels out"


def _limits(recipe: "Recipe") -> list[tuple[str, "LevelGates"]]:
    """Return the limits of all levels and of single ones, by their place in a recipe."""
    gates = recipe.gates
    return [("gates", gates), *((f"gates.level.{name}", limits) for name, limits in gates.level.items())]


def _needing_labels(recipe: "Recipe") -> list[tuple[str, str]]:
    """Return key and problem of each option that needs labels."""
    model, data, train, finetune = recipe.model, recipe.data, recipe.train, recipe.finetune
    rules = [
        (
            "model.new_head",
            model.new_head,
            "model.new_head = true: a new classifier learns from labels; leave it out to keep the model's",
        ),
        (
            "finetune.epochs",
            finetune.epochs,
            f"finetune.epochs = {finetune.epochs}: fine-tuning learns from labels; leave it out, and give a "
            "checkpoint that is fine-tuned already",
        ),
        (
            "finetune.save",
            finetune.save is not None and not finetune.epochs,
            f"finetune.save = {format_toml(finetune.save)} has nothing to save without fine-tuning, which "
            "learns from labels; leave it out",
        ),
        (
            "train.teacher",
            train.teacher == "none",
            'train.teacher = "none" leaves nothing to learn from without labels; give original, self, both '
            "or a timm model",
        ),
        (
            "train.loss",
            train.loss != "ce",
            f"train.loss = {format_toml(train.loss)} is a loss of labels; leave it out",
        ),
        (
            "train.class_weights",
            train.class_weights is not None,
            f"train.class_weights = {format_toml(train.class_weights)} needs labels to count; leave it out",
        ),
        (
            "data.labels",
            data.labels is not None,
            f"data.labels = {format_toml(data.labels)} are labels; leave one of them out",
        ),
        (
            "data.hierarchy",
            data.hierarchy is not None,
            f"data.hierarchy = {format_toml(data.hierarchy)} maps the classes of labels; leave it out",
        ),
        (
            "data.calibrate",
            data.calibrate is not None,
            f"data.calibrate = {data.calibrate}: temperatures and consensus weights are fitted to labels; "
            "leave it out",
        ),
    ]
    for key in ("mixup", "cutmix", "smoothing"):
        value = getattr(recipe.augment, key)
        text = f"augment.{key} = {value:g} changes labels, of which there are none; leave it out"
        rules.append((f"augment.{key}", value, text))
    for k, level in enumerate(recipe.level, start=1):
        text = f"level[{k}].distill = {level.distill} leaves a share of the loss to labels; leave it out"
        rules.append((f"level[{k}].distill", level.distill is not None and level.distill < 1, text))
    for place, limits in _limits(recipe):
        for gate in LABEL_GATES:
            key = f"{place}.{gate}"
            text = (
                f"{key} limits the accuracy, which is not measured without labels; use min_agreement, or of "
                "a backbone min_cosine"
            )
            rules.append((key, getattr(limits, gate) is not None, text))
    return [(key, text) for key, applies, text in rules if applies]
