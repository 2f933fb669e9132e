"""What a run leaves in memory, before it is written."""

from collections.abc import Sequence
from dataclasses import dataclass

from nestify.data.hierarchy import Labels
from nestify.evaluate.accuracy import Accuracy
from nestify.evaluate.calibration import Calibration
from nestify.model.nested_model import NestedModel
from nestify.model.pretrained import PretrainedModel
from nestify.recipe.levels import Level
from nestify.schedule.costs import LevelCost


@dataclass(frozen=True)
class Compressed:
    """What a run leaves in memory, before it is written.

    Attributes:
        nested: the trained model, on the CPU, in eval mode. `levels`: its levels, budgets solved.
        costs: of its levels, core first.
        missed: a sentence for each level that came out at another cost than its budget.
        original: accuracy of the dense model before nesting; None if there was nothing to validate.
        calibration: what was fitted on training images that were held out; None if none were.
        before, after: accuracy of every level, core first; `before` is empty where it was not asked for.
    """

    nested: NestedModel
    levels: Sequence[Level]
    pretrained: PretrainedModel
    costs: Sequence[LevelCost]
    missed: Sequence[str]
    labels: Labels
    original: Accuracy | None
    before: Sequence[Accuracy]
    after: Sequence[Accuracy]
    calibration: Calibration | None
