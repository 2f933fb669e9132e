"""The result of a run in memory, before it is written."""

from collections.abc import Sequence
from dataclasses import dataclass

from nestify.data.hierarchy import ClassLevels
from nestify.evaluation.calibration import Calibration
from nestify.evaluation.measure import Score
from nestify.model.nested_model import NestedModel
from nestify.model.pretrained import PretrainedModel
from nestify.recipe.levels import Level
from nestify.schedule.costs import LevelCost


@dataclass(frozen=True)
class Compressed:
    """Result of a run in memory, before it is written.

    Attributes:
        nested: the trained model, on the CPU, in eval mode.
        levels: its levels, with budgets solved.
        missed: a sentence for each level that missed its budget.
        pretrained: the model that the run started from.
        costs: costs of the levels, core first.
        labels: classes that each level predicts.
        original: accuracy of the dense model before nesting; None if there was nothing to validate.
        before: accuracy of every level before training, core first; empty if not requested.
        after: accuracy of every level after training, core first.
        calibration: temperatures and weights fitted on held-out training images; None if none were.
    """

    nested: NestedModel
    levels: Sequence[Level]
    pretrained: PretrainedModel
    costs: Sequence[LevelCost]
    missed: Sequence[str]
    labels: ClassLevels
    original: Score | None
    before: Sequence[Score]
    after: Sequence[Score]
    calibration: Calibration | None
