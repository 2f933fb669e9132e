"""Tables of few images and few classes: intervals of top-1, and no top-5 where it means little."""

import pytest

from nestify.report.sheet import Column
from nestify.report.table import interval_columns, interval_notes, report_notes, report_table, top5_columns
from tests.report.report_builders import report


def cells(columns: list[Column]) -> list[str]:
    return [cell for column in columns for cell in column.cells]


@pytest.mark.parametrize(
    ("top1", "images", "expected"),
    [
        (100.0, 18, "82.4-100.0"),  # from n / (n + z^2)
        (0.0, 18, "0.0-17.6"),  # to z^2 / (n + z^2)
        (50.0, 10, "23.7-76.3"),  # in many textbooks
        (80.0, 10, "49.0-94.3"),
    ],
)
def test_wilson_intervals(top1: float, images: int, expected: str) -> None:
    assert cells(interval_columns([(top1, images), (None, None)])) == [expected, "-"]
    [note] = interval_notes([(top1, images)])
    assert f"only {images} images" in note


def test_a_hundred_images_need_no_interval() -> None:
    assert interval_columns([(90.0, 100), (None, 10), (90.0, None)]) == []
    assert interval_notes([(90.0, 100)]) == []


def test_top5_of_few_classes() -> None:
    assert top5_columns([(100.0, 9), (100.0, 3)], rank=1) == []
    assert top5_columns([(None, 1000)], rank=1) == []
    assert cells(top5_columns([(100.0, 3), (90.0, 10)], rank=1)) == ["-", "90.00"]


def test_the_table_of_a_report() -> None:
    def titles(**changes: object) -> list[str]:
        return [column.title for column in report_table(report({**changes}, {**changes})).columns]

    assert {"top-1 %", "top-5 %"} <= set(titles())
    assert "top-1 interval" not in titles()
    assert "top-1 interval" in titles(images=99)
    assert "top-5 %" not in titles(classes=9)
    assert any("99 images" in note for note in report_notes(report({"images": 99})))
