"""The training curves of a nested file, from the log of its run, `NAME.metrics.jsonl`. No torch here.

The log is not part of the nested file, and anyone can have written it: it is read with bounds, and only
used if its last evaluation is the one that the nested file holds.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nestify.errors import BadFileError
from nestify.file.source import LocalFile
from nestify.file.summary import Report
from nestify.file.untrusted import quoted, strict_json
from nestify.files import metrics_path
from nestify.recipe.levels import MAX_LEVELS
from nestify.recipe.metric import metric_of

MAX_BYTES = 2**26
"""Maximum size of a log that is read."""

Epoch = Annotated[int, Field(ge=0, le=10**6)]
Loss = Annotated[float, Field(ge=-1e6, le=1e6)]
Percent = Annotated[float, Field(ge=0, le=100)]


class _Line(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class TrainingEpoch(_Line):
    """Means over the training images of one epoch.

    Attributes:
        event: `finetune` for the fine-tuning of the dense model, `train` for the training of the levels.
        epoch: number of the epoch, counted from 1.
        losses: mean loss of each level, core first; None if the level was not sampled.
        top1: percentage of correct predictions of each level, core first; empty without labels, or with
            several per image.
        agreement: percentage of the teacher's predictions that each level makes too; empty with labels, and
            of a backbone.
    """

    event: Literal["finetune", "train"]
    epoch: Epoch
    losses: Annotated[list[Loss | None], Field(max_length=MAX_LEVELS)]
    top1: Annotated[list[Percent], Field(max_length=MAX_LEVELS)] = []
    agreement: Annotated[list[Percent], Field(max_length=MAX_LEVELS)] = []

    @property
    def scores(self) -> list[float]:
        """The values of `agreement`, or else of `top1`."""
        return self.agreement or self.top1


class LevelScore(_Line):
    """What was measured of one level on the validation images.

    Attributes:
        level: number of the level, 1 for the core level; 0 for the dense model.
        top1: top-1 in percent; None without labels, or with several per image.
        loss: mean cross-entropy; None if it was not finite, and without labels.
        map: mean average precision in percent; None unless images have several labels.
        agreement: agreement in percent; None with labels, and of a backbone.
        cosine: mean cosine similarity of the outputs; None with labels.
        images: number of images.
    """

    level: Annotated[int, Field(ge=0, le=MAX_LEVELS)]
    images: Epoch
    top1: Percent | None = None
    loss: Loss | None = None
    map: Percent | None = None
    agreement: Percent | None = None
    cosine: Annotated[float, Field(ge=-1, le=1)] | None = None

    @property
    def score(self) -> float | None:
        """What the level is judged by, in percent."""
        return metric_of(self).score(self)


class ValidationEpoch(_Line):
    """An evaluation on the validation images.

    Attributes:
        moment: the model or the time of the evaluation.
        epoch: number of finished epochs of the training.
        levels: scores of the levels, core first.
    """

    event: Literal["evaluation"]
    moment: Literal["original", "before", "epoch", "after"]
    epoch: Epoch
    levels: Annotated[list[LevelScore], Field(max_length=MAX_LEVELS)]


@dataclass(frozen=True)
class History:
    """What the log of a run says about its epochs.

    Attributes:
        finetuning: epochs of the fine-tuning of the dense model.
        training: epochs of the training of the levels.
        validation: evaluations of the levels, in the order of the epochs.
        problem: why a log that exists is not used; empty if nothing is wrong.
    """

    finetuning: Sequence[TrainingEpoch] = ()
    training: Sequence[TrainingEpoch] = ()
    validation: Sequence[ValidationEpoch] = ()
    problem: str = ""


def read_history(report: Report) -> History:
    """Return the history of a nested file, from the log next to it; empty if there is no log.

    Args:
        report: report of the nested file. A file that is read by its address has no log.
    """
    place = metrics_path(Path(report.path))
    if not os.path.exists(report.path) or not os.path.exists(place):
        return History()
    try:
        lines = _read(place)
    except (BadFileError, ValueError) as error:
        reason = str(error).removeprefix(f"{place}: ")
        return History(problem=f"{place} has no training curves that can be read: {reason}.")
    evaluations = [line for line in lines if isinstance(line, ValidationEpoch)]
    after = [line for line in evaluations if line.moment == "after"]
    if not after or not _fits(report, after[-1]):
        return History(
            problem=f"{place} is the log of another run or of one that has not ended: the accuracies in it "
            "are not those of this file. The training curves are left out."
        )
    epochs = [line for line in lines if isinstance(line, TrainingEpoch)]
    return History(
        finetuning=[line for line in epochs if line.event == "finetune"],
        training=[line for line in epochs if line.event == "train"],
        validation=[line for line in evaluations if line.moment != "original"],
    )


def _fits(report: Report, after: ValidationEpoch) -> bool:
    """Return whether the last evaluation in a log is the one that a nested file holds.

    A slice has fewer levels than the log of its run.
    """
    scores = {score.level: score for score in after.levels}
    for level in report.levels:
        score = scores.get(level.level)
        if score is None or level.score is None or score.images != level.images:
            return False
        names = [name for name in metric_of(level).values if name in LevelScore.model_fields]
        pairs = [(getattr(score, name), getattr(level, name)) for name in names]
        if any(one is None or other is None or not isclose(one, other) for one, other in pairs):
            return False
    return True


def _read(place: Path) -> list[TrainingEpoch | ValidationEpoch]:
    """Return the epochs and evaluations of a log; its other events are not needed here.

    Raises:
        BadFileError: if the log is not a regular file, or cannot be read.
        ValueError: if a line is not what `compress` writes.
    """
    source = LocalFile(place)
    if source.size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
    events: dict[object, type[TrainingEpoch | ValidationEpoch]] = {
        "finetune": TrainingEpoch,
        "train": TrainingEpoch,
        "evaluation": ValidationEpoch,
    }
    lines = []
    for number, text in enumerate(source.read(0, source.size).decode().splitlines(), start=1):
        try:
            content: Any = strict_json(text)
            event = content.get("event") if isinstance(content, dict) else None
            if isinstance(event, str) and event in events:
                lines.append(events[event].model_validate(content))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"line {number}, {quoted(where)}: {first['msg']}") from None
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return lines
