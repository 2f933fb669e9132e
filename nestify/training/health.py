"""Detect failures of a run: levels that collapsed, levels without weights, masks that stop changing."""

from collections.abc import Sequence
from math import sqrt

from nestify.errors import DivergedError
from nestify.evaluation.measure import Score
from nestify.model.nested_model import NestedModel
from nestify.recipe.levels import Level
from nestify.recipe.recipe import Recipe

CHANCE_FACTOR = 1.5
"""A level is at chance if its accuracy is at most this factor times the accuracy of guessing."""
ORIGINAL_FACTOR = 3.0
"""A level at chance has collapsed only if the dense model reached this factor times that limit."""
MIN_LOSS = 1.0
"""A level that loses at most this many points of accuracy in training is not reported."""
MIN_RISE = 0.02
"""A level is reported if its target sparsity rose by more than this while its masks stayed the same."""


def find_collapsed(original: Score, results: Sequence[Score], classes: Sequence[int]) -> list[Score]:
    """Return the results of the levels whose accuracy is at chance, although the dense model did much better.

    Args:
        original: accuracy of the dense model.
        results: accuracies of the levels that were trained.
        classes: number of classes of every level, core first.
    """
    if not original.metric.counts_images:
        return []  # what guessing reaches is not known
    limits = [100 * CHANCE_FACTOR / count for count in classes]
    return [
        result
        for result in results
        if result.score <= limits[result.level - 1]
        and original.score >= ORIGINAL_FACTOR * limits[result.level - 1]
    ]


def check_collapse(
    original: Score, results: Sequence[Score], classes: Sequence[int], names: Sequence[str]
) -> list[str]:
    """Return a sentence for each level that collapsed in training.

    Args:
        original: accuracy of the dense model.
        results: accuracies of the levels that were trained.
        classes: number of classes of every level, core first.
        names: name of every level, core first.

    Raises:
        DivergedError: if all trained levels collapsed.
    """
    collapsed = find_collapsed(original, results, classes)
    if results and len(collapsed) == len(results):
        best = max(result.score for result in results)
        raise DivergedError(
            f"every level collapsed: the best {original.metric.title} after training is {best:.2f} %, and "
            f"that of the original model is {original.score:.2f} %; a smaller --lr (train.lr) may help"
        )
    return [
        f"level {result.level} ({names[result.level - 1]}) collapsed: its {result.metric.title} after "
        f"training is {result.score:.2f} %, no better than chance; a smaller --lr (train.lr), more --epochs, "
        "or a larger level may help"
        for result in collapsed
    ]


def check_gain(before: Sequence[Score], after: Sequence[Score], names: Sequence[str]) -> list[str]:
    """Return a sentence for each level that training made worse than it was without.

    Losses of up to `MIN_LOSS` points, and up to twice the standard error of the difference, do not count.

    Args:
        before: accuracies of the levels without training; empty if they were not measured.
        after: accuracies of the same levels after training.
        names: name of every level, core first.
    """
    sentences = []
    for untrained, trained in zip(before, after, strict=bool(before)):
        if not trained.metric.counts_images:
            continue
        shares = [result.score / 100 for result in (untrained, trained)]
        error = 100 * sqrt(sum(share * (1 - share) for share in shares) / trained.images)
        if untrained.score - trained.score > max(MIN_LOSS, 2 * error):
            sentences.append(
                f"level {trained.level} ({names[trained.level - 1]}) has a {trained.metric.title} of "
                f"{trained.score:.2f} % after training, and {untrained.score:.2f} % without; more --epochs "
                "or another --lr (train.lr) may help, and --epochs 0 keeps the levels without training"
            )
    return sentences


def find_problems(
    nested: NestedModel, recipe: Recipe, original: Score, before: Sequence[Score], after: Sequence[Score]
) -> list[str]:
    """Return a sentence for each level of a finished run that cannot be useful.

    Args:
        nested: the finished model.
        recipe: the recipe of the run.
        original: accuracy of the dense model.
        before: accuracies of the levels without training; empty if they were not measured.
        after: accuracies of the levels.

    Raises:
        DivergedError: if no level learned anything.
    """
    problems = check_empty(nested)
    if recipe.train.epochs:
        trained = [result for result in after if recipe.level[result.level - 1].weight != 0]
        problems += check_collapse(original, trained, nested.classes, nested.level_names)
        problems += check_gain(before, after, nested.level_names)
    return problems


def check_empty(nested: NestedModel) -> list[str]:
    """Return a sentence for each level that has no weight left, in one of its layers or in all of them."""
    sentences = [_empty(nested, level) for level in range(1, nested.n_levels + 1)]
    return [sentence for sentence in sentences if sentence]


def _empty(nested: NestedModel, level: int) -> str:
    entry, name = nested.entry_levels, nested.level_names[level - 1]
    has = [weight for weight in entry if nested.elements(level, weight)]
    empty = [weight for weight in has if not entry.count_kept(level, weight)]
    if not empty:
        return ""
    if len(empty) == len(has):
        return f"level {level} ({name}) has no maskable weight left; give it less sparsity"
    more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
    return (
        f"level {level} ({name}) has no weight left in {empty[0]}{more}, so that its outputs are constant; "
        'give it less sparsity, or schedule.score = "lamp"'
    )


class RampWatch:
    """Detects masks that stop changing while their target sparsity still rises.

    Attributes:
        last_changes: for each level, core first, the last change of its sparsity: the sparsity that was
            reached, the step, and the target sparsity at that step.
    """

    def __init__(self) -> None:
        self.last_changes: list[tuple[float, int, float]] = []

    def record(self, step: int, levels: Sequence[Level], achieved: Sequence[float]) -> None:
        """Record the sparsities of the levels after their weights were chosen again.

        Args:
            step: the training step that follows.
            levels: the levels with their target sparsities at this step, core first.
            achieved: the sparsities that the levels have reached, core first.
        """
        now = [(reached, step, level.sparsity) for reached, level in zip(achieved, levels, strict=True)]
        old = self.last_changes or now
        self.last_changes = [last if last[0] == new[0] else new for last, new in zip(old, now, strict=True)]

    def find_problems(self, levels: Sequence[Level]) -> list[str]:
        """Return a sentence for each level whose masks stopped changing before its target stopped rising.

        Args:
            levels: the levels with their final target sparsities, core first.
        """
        changes = zip(levels, self.last_changes, strict=True)
        return [
            f"the masks of level {k} ({level.name}) have not changed since step {step}: its sparsity is "
            f"{reached:.4f}, but its target is {level.sparsity:.4f}; check its pattern and schedule.skip"
            for k, (level, (reached, step, target)) in enumerate(changes, start=1)
            if level.sparsity - target > MIN_RISE
        ]
