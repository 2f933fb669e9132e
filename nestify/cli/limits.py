"""Limits of `nestify eval` on what it measures: --min-top1, --min-map, --min-agreement and --min-cosine."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nestify.errors import RecipeError
from nestify.recipe.metric import MAP, TOP1, Metric

if TYPE_CHECKING:
    from nestify.evaluation.evaluate import Evaluation


def check_limits(limits: Mapping[Metric, float], has_labels: bool, unlabelled: bool) -> None:
    """Refuse limits on what is not measured.

    Args:
        limits: limits in percent.
        has_labels: whether images may have several labels.
        unlabelled: whether labels are not read.

    Raises:
        RecipeError: for the first one.
    """
    for metric in limits:
        if metric.is_comparison and not unlabelled:
            usual = (MAP if has_labels else TOP1).flag
            raise RecipeError(f"{metric.flag} is measured without labels; add --unlabelled, or use {usual}")
        if unlabelled and not metric.is_comparison:
            raise RecipeError(f"{metric.flag} needs labels; use --min-agreement, or leave out --unlabelled")
        if metric is MAP and not has_labels:
            raise RecipeError("--min-map needs several labels per image; give --labels, or use --min-top1")
        if metric is TOP1 and has_labels:
            raise RecipeError("--min-top1 needs one class per image; use --min-map, or leave out --labels")


def levels_below(done: "Evaluation", metric: Metric, limit: float) -> str:
    """Return the levels whose score is below a limit, in words; empty if there are none."""
    scores = [
        (name, result.level, metric.score(result))
        for name, result in zip(done.names, done.levels, strict=True)
    ]
    return ", ".join(
        f"level {level} ({name}) has {metric.title} {score:.2f} %"
        for name, level, score in scores
        if score is not None and score < limit
    )
