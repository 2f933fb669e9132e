"""Signs that a run goes wrong: levels that collapsed, levels that are empty, masks that stand still."""

from collections.abc import Sequence

from nestify.errors import DivergedError
from nestify.evaluation.accuracy import Accuracy
from nestify.model.nested_model import NestedModel
from nestify.recipe.levels import Level

AT_CHANCE = 1.5
"""A level answers by chance up to this times the accuracy of guessing."""
WORTH_KEEPING = 3.0
"""How many times better the dense model must have been for that to be a loss."""
STILL = 0.02
"""By how much a level's sparsity should have risen before masks that stay the same are told of."""


def collapsed_levels(
    original: Accuracy, results: Sequence[Accuracy], classes: Sequence[int]
) -> list[Accuracy]:
    """The levels that answer by chance, though the dense model did much better.

    Args:
        results: of levels that were trained. `classes`: how many every level tells, core first.
    """
    limits = [100 * AT_CHANCE / count for count in classes]
    return [
        result
        for result in results
        if result.top1 <= limits[result.level - 1]
        and original.top1 >= WORTH_KEEPING * limits[result.level - 1]
    ]


def check_collapse(
    original: Accuracy, results: Sequence[Accuracy], classes: Sequence[int], names: Sequence[str]
) -> list[str]:
    """A sentence for each level that collapsed in training.

    Args:
        results: of the levels that were trained. `classes`, `names`: of all levels, core first.

    Raises:
        DivergedError: if all of them did.
    """
    collapsed = collapsed_levels(original, results, classes)
    if results and len(collapsed) == len(results):
        best = max(result.top1 for result in results)
        raise DivergedError(
            f"every level collapsed: none has more than {best:.2f} % top-1 after training, and the original "
            f"has {original.top1:.2f} %; a smaller train.lr may help"
        )
    return [
        f"level {result.level} ({names[result.level - 1]}) collapsed: its top-1 after training is "
        f"{result.top1:.2f} %, no better than chance; a smaller train.lr, more epochs or a larger level may "
        "help"
        for result in collapsed
    ]


def check_empty(nested: NestedModel) -> list[str]:
    """A sentence for each level that has weights masked out to the last one, of a layer or of all."""
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
    """Notices masks that stand still while the sparsity that they should have rises.

    Attributes:
        seen: of each level, core first, where its masks changed last: the sparsity that came out, the step,
            and the sparsity that was asked for.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[float, int, float]] = []

    def note(self, step: int, levels: Sequence[Level], achieved: Sequence[float]) -> None:
        """Weights were chosen again before a step.

        Args:
            levels: with the sparsities that were asked for. `achieved`: those that came out.
        """
        now = [(came, step, level.sparsity) for came, level in zip(achieved, levels, strict=True)]
        old = self.seen or now
        self.seen = [last if last[0] == new[0] else new for last, new in zip(old, now, strict=True)]

    def problems(self, levels: Sequence[Level]) -> list[str]:
        """A sentence for each level whose masks stopped before its sparsity did.

        Args:
            levels: with their targets.
        """
        return [
            f"the masks of level {k} ({level.name}) stand still since step {step}: its sparsity stayed "
            f"{came:.4f} while {level.sparsity:.4f} was asked for; look at its pattern and at schedule.skip"
            for k, (level, (came, step, asked)) in enumerate(zip(levels, self.seen, strict=True), start=1)
            if level.sparsity - asked > STILL
        ]
