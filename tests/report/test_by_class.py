"""Accuracy by class on the page: the worst classes first, with names, and nothing becomes markup."""

from typing import Any

import pytest

from nestify.file.class_accuracy import ClassAccuracy, LevelClasses, SavedAccuracy
from nestify.report.html.by_class import MOST_CLASSES, worst_classes
from nestify.report.html.page import html_page
from tests.report import reports
from tests.report.test_html import TAGS, Page


def accuracy(*levels: tuple[list[int], list[int]], **changes: Any) -> ClassAccuracy:
    """Build the accuracy of levels 1, 2, ...: images and correct predictions by class."""
    facts = {"header_sha256": "ab" * 32, "data": "photos", "date": "2026-01-31T12:00:00Z"}
    counts = [
        LevelClasses(level=k, name=f"level{k}", images=images, correct=correct)
        for k, (images, correct) in enumerate(levels, start=1)
    ]
    return ClassAccuracy(**{**facts, "levels": counts, **changes})


def test_the_worst_classes_come_first() -> None:
    report = reports.report(class_names=["maple", "trout", "oak", "carp"])
    [worst] = worst_classes(report, accuracy(([8, 0, 10, 4], [6, 0, 1, 4])))
    assert [(bar.name, bar.text) for bar in worst.bars] == [
        ("oak", "10.0 % of 10"),
        ("maple", "75.0 % of 8"),
        ("carp", "100.0 % of 4"),
    ]
    assert [bar.percent for bar in worst.bars] == pytest.approx([10, 75, 100])
    assert (worst.level, worst.classes, worst.without_images) == ("level1", 3, 1)


def test_a_level_with_coarser_classes_has_their_names() -> None:
    first, second = worst_classes(
        reports.with_classes(), accuracy(([5, 5], [4, 5]), ([2, 3, 2, 3], [2, 3, 2, 0]))
    )
    assert [bar.name for bar in first.bars] == ["tree", "fish"]
    assert second.bars[0].name == "carp"


def test_only_the_worst_of_many_classes_are_shown() -> None:
    n = 100
    levels = [reports.level(k, 2, classes=n) for k in (1, 2)]
    report = reports.report(*levels, num_classes=n)
    [worst] = worst_classes(report, accuracy(([100] * n, list(range(n)))))
    assert [bar.name for bar in worst.bars] == [str(k) for k in range(MOST_CLASSES)]
    assert worst.classes == n
    page = Page(html_page(report, evaluated=SavedAccuracy(accuracy(([100] * n, list(range(n)))))))
    assert f"level1: the {MOST_CLASSES} worst of 100 classes" in page.texts_in("summary")


def test_the_page_shows_it_without_scripts() -> None:
    report = reports.report(class_names=[f"{reports.PRINTABLE}{k}" for k in range(4)])
    page = Page(
        html_page(report, evaluated=SavedAccuracy(accuracy(([4] * 4, [0, 1, 2, 3]), data="my photos")))
    )
    assert {tag for tag, _ in page.tags} <= TAGS
    assert "Accuracy by class" in page.texts_in("h2")
    assert "Accuracy by class" in page.texts_in("a")
    assert f"{reports.PRINTABLE}0" in page.texts_in("span")
    assert {"0.0 % of 4", "75.0 % of 4"} <= set(page.texts_in("span"))
    assert any("my photos, 2026-01-31" in text for text in page.texts_in("p"))


def test_a_problem_is_shown_in_its_place() -> None:
    found = SavedAccuracy(problem="net.eval.json: another file")
    page = Page(html_page(reports.report(), evaluated=found))
    assert "net.eval.json: another file" in page.texts_in("p")
    assert "Accuracy by class" not in Page(html_page(reports.report())).texts_in("h2")
