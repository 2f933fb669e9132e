"""The classes that each level predicts worst, as bars. Pure arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

from nestify.file.class_accuracy import ClassAccuracy, LevelClasses
from nestify.file.summary import LevelReport, Report

MOST_CLASSES = 20
"""Number of classes that are shown of each level."""


@dataclass(frozen=True)
class ClassBar:
    """The accuracy of one class.

    Attributes:
        name: name of the class, or its index if the file has no names.
        percent: share of its images that were predicted correctly, in percent.
        text: the same as text, with the number of images.
    """

    name: str
    percent: float
    text: str


@dataclass(frozen=True)
class WorstClasses:
    """The classes that a level predicts worst.

    Attributes:
        level: name of the level.
        classes: number of classes with images.
        bars: up to `MOST_CLASSES` classes, the worst first.
        without_images: number of classes without images, whose accuracy is not known.
    """

    level: str
    classes: int
    bars: Sequence[ClassBar]
    without_images: int


def worst_classes(report: Report, accuracy: ClassAccuracy) -> list[WorstClasses]:
    """Return the worst classes of each level that was evaluated, core first.

    Args:
        report: report of the file.
        accuracy: its accuracy by class.
    """
    levels = {level.level: level for level in report.levels}
    return [_worst(report, levels[counts.level], counts) for counts in accuracy.levels]


def _worst(report: Report, level: LevelReport, counts: LevelClasses) -> WorstClasses:
    names = _class_names(report, level)
    known = [
        (right / images, index, images)
        for index, (images, right) in enumerate(zip(counts.images, counts.correct, strict=True))
        if images
    ]
    bars = [
        ClassBar(names[index], 100 * share, f"{100 * share:.1f} % of {images:,}")
        for share, index, images in sorted(known)[:MOST_CLASSES]
    ]
    return WorstClasses(level.name, len(known), bars, len(names) - len(known))


def _class_names(report: Report, level: LevelReport) -> Sequence[str]:
    """Return the names of the classes that a level predicts, or their indices if the file has no names."""
    coarse = next((classes for classes in report.hierarchy if classes.name == level.class_set), None)
    if level.class_set and coarse is not None:
        return coarse.class_names
    return report.class_names or [str(index) for index in range(level.classes)]
