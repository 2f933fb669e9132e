"""What levels are judged by: accuracy, mean average precision, or likeness to the original. Without torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from nestify.recipe.options import DataOptions


@dataclass(frozen=True)
class Metric:
    """What levels are judged by.

    Attributes:
        key: name of its value in logs, in nested files and in JSON.
        title: what tables and progress lines call it.
        subject: what headings call it.
        values: everything that is measured with it, by name; the first is `key`.
        gate: the limit on it in [gates], which is also a flag of `nestify eval`.
        meaning: what it is, for notes below tables, with {} for the reference; empty if the title says it.
        scale: what a value is multiplied by for its score in percent.
        counts_images: whether the score is a share of the images, which has an interval of confidence.
        is_comparison: whether levels are compared with a reference, in place of labels.
    """

    key: str
    title: str
    subject: str
    values: tuple[str, ...]
    gate: str
    meaning: str = ""
    scale: float = 1.0
    counts_images: bool = False
    is_comparison: bool = False

    @property
    def flag(self) -> str:
        """The flag of the limit."""
        return f"--{self.gate.replace('_', '-')}"

    def score(self, measured: object) -> float | None:
        """Return the score in percent of what has the value as an attribute; None if it was not measured."""
        value = getattr(measured, self.key)
        return None if value is None else self.scale * value

    def score_before(self, measured: object) -> float | None:
        """Return the score without training."""
        value = getattr(measured, f"{self.key}_before")
        return None if value is None else self.scale * value


TOP1 = Metric("top1", "top-1", "Accuracy", ("top1", "top5", "loss"), "min_top1", counts_images=True)

MAP = Metric(
    "map",
    "mAP",
    "Mean average precision",
    ("map", "loss"),
    "min_map",
    "Several labels per image: mAP is the mean average precision over the labels.",
)

AGREEMENT = Metric(
    "agreement",
    "agreement",
    "Agreement",
    ("agreement", "cosine"),
    "min_agreement",
    "agreement is the share of images whose class {} predicts too, cosine the mean cosine similarity of "
    "the logits",
    counts_images=True,
    is_comparison=True,
)

COSINE = Metric(
    "cosine",
    "cosine",
    "Similarity",
    ("cosine",),
    "min_cosine",
    "cosine is the mean cosine similarity of the outputs and those of {}, in percent",
    scale=100.0,
    is_comparison=True,
)

METRICS = (TOP1, MAP, AGREEMENT, COSINE)
"""All metrics. A model that agrees with the original has a cosine too, so the agreement comes first."""


def metric_of(measured: object) -> Metric:
    """Return the metric that was measured of a level: the first one that has a value, or else top-1."""
    return next((each for each in METRICS if getattr(measured, each.key) is not None), TOP1)


class Judged:
    """A result of a level that is judged by one metric."""

    metric: ClassVar[Metric]

    @property
    def score(self) -> float:
        """The score in percent."""
        score = self.metric.score(self)
        assert score is not None
        return score


def metric_of_run(data: "DataOptions", classifies: bool = True) -> Metric:
    """Return what the levels of a run are judged by.

    Args:
        data: whether labels are read, and which.
        classifies: whether the model has a classifier; a backbone returns embeddings or feature maps.
    """
    if data.labels is not None:
        return MAP
    if not data.unlabelled:
        return TOP1
    return AGREEMENT if classifies else COSINE
