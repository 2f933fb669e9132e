"""The consensus and the cascade that were requested for the levels of a file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

from nestify.errors import RecipeError
from nestify.evaluation.cascade import SWEEP, Cascade, prepare_cascade
from nestify.evaluation.consensus import Consensus, Predictions, consensus
from nestify.file.manifest import LevelEntry
from nestify.recipe.amounts import Budget, did_you_mean, parse_budget, share_meant
from nestify.recipe.options import ConsensusKind


@dataclass(frozen=True)
class JointEvaluation:
    """The consensus and cascade that were requested for levels 1 to n.

    Args:
        levels: levels of the file, core first.
        kind: kind of consensus; None for none.
        cascade_option: the cascade, as users write it; None for none.

    Raises:
        RecipeError: on construction, if an option is not valid, or the file has no learned consensus.
    """

    levels: Sequence[LevelEntry]
    kind: ConsensusKind | None
    cascade_option: float | str | None
    _cascade: float | Budget | None = field(init=False)

    def __post_init__(self) -> None:
        kinds = get_args(ConsensusKind)
        if self.kind not in (None, *kinds):
            raise RecipeError(f"--consensus {self.kind} is not {' or '.join(kinds)}")
        if self.kind == "learned" and not self.levels[-1].consensus:
            raise RecipeError(
                "--consensus learned: the file has no weights for it; write it with compress --consensus, or "
                "give mean"
            )
        if self.is_requested and len(self.levels) < 2:
            raise RecipeError(
                "--consensus and --cascade need two levels or more; give a higher --level, or all"
            )
        object.__setattr__(
            self,
            "_cascade",
            None if self.cascade_option in (None, "sweep") else _parse_cascade(self.cascade_option),
        )

    @property
    def is_requested(self) -> bool:
        """Whether a consensus or a cascade was requested."""
        return self.kind is not None or self.cascade_option is not None

    @property
    def calibrated(self) -> bool:
        """Whether the file holds a temperature for each level."""
        return all(level.temperature is not None for level in self.levels)

    @property
    def macs(self) -> list[tuple[int | None, int | None]]:
        """The dense and effective MACs per image of every level."""
        return [(level.metrics.dense_macs, level.metrics.effective_macs) for level in self.levels]

    def evaluate(self, predictions: Predictions) -> tuple[list[Consensus], list[Cascade]]:
        """Evaluate what was requested, from the predictions of these levels."""
        agreed = [
            consensus(
                predictions, k, self.levels[k - 1].consensus if self.kind == "learned" else (), self.macs
            )
            for k in range(2, len(self.levels) + 1)
            if self.kind is not None
        ]
        if self.cascade_option is None:
            return agreed, []
        cascade = prepare_cascade(predictions, [level.temperature or 1.0 for level in self.levels], self.macs)
        if self._cascade is None:
            return agreed, [cascade.at_threshold(threshold) for threshold in SWEEP]
        if isinstance(self._cascade, Budget):
            return agreed, [cascade.within_budget(self._cascade.target(self.macs[-1][1] or 0))]
        return agreed, [cascade.at_threshold(self._cascade)]


def _parse_cascade(cascade_option: float | str | None) -> float | Budget:
    """Parse a threshold, or a budget of MACs."""
    hint = ""
    try:
        if isinstance(cascade_option, str) and "=" in cascade_option:
            budget = parse_budget(cascade_option)
            if budget.quantity == "macs":
                return budget
        elif 0 <= (threshold := float(cascade_option or 0)) <= 1:
            return threshold
        else:
            hint = did_you_mean(share_meant(threshold))
    except ValueError as error:
        _, found, suggestion = str(error).partition("; did you mean ")
        hint = found + suggestion or did_you_mean(share_meant(cascade_option))
    raise RecipeError(
        f"--cascade {cascade_option} is not a threshold in [0, 1] (0.8), macs=0.5, or sweep{hint}"
    )
