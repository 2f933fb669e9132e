"""Tables that fit their width: which columns are left out first, and that no text is cut."""

import io

import pytest
from rich.console import Console

from nestify.report.sheet import Column, Sheet

SHEET = Sheet(
    [
        Column("name", ["tiny", "whole"], is_text=True),
        Column("dense MACs", ["1.5G", "20G"], rank=1),
        Column("top-1 %", ["70.00", "80.00"]),
        Column("images/s", ["100", "10"], rank=2),
    ]
)


def lines_of(sheet: Sheet, width: int | None) -> tuple[list[str], list[str]]:
    """Return the table's lines at a width, and the columns that were left out."""
    table, left_out = sheet.fit(width)
    console = Console(file=io.StringIO(), width=width or 1000)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()], left_out


@pytest.mark.parametrize("width", [None, 36])
def test_all_in_one_line(width: int | None) -> None:
    assert lines_of(SHEET, width) == (
        [
            "name   dense MACs  top-1 %  images/s",
            "────────────────────────────────────",
            "tiny         1.5G    70.00       100",
            "whole         20G    80.00        10",
        ],
        [],
    )


def test_titles_break_before_a_column_is_left_out() -> None:
    lines, left_out = lines_of(SHEET, 35)
    assert left_out == []
    assert lines[:2] == ["       dense  top-1", "name    MACs      %  images/s"]


def test_the_least_important_columns_are_left_out_first() -> None:
    lines, left_out = lines_of(SHEET, 28)
    assert left_out == ["images/s"]
    assert lines[1] == "name    MACs      %"
    lines, left_out = lines_of(SHEET, 15)
    assert left_out == ["images/s", "dense MACs"]
    assert lines == ["       top-1", "name       %", "────────────", "tiny   70.00", "whole  80.00"]


def test_long_names_are_folded() -> None:
    name = "blocks.3.2.conv_pwl.weight" * 2
    sheet = Sheet([Column("weight", [name], is_text=True), Column("density", ["0.5000"])])
    lines, left_out = lines_of(sheet, 40)
    assert left_out == []
    assert max(map(len, lines)) <= 40
    assert "".join(line.split()[0] for line in lines[2:]) == name
    assert lines[-1].endswith("0.5000")


def test_wide_letters_take_two_columns() -> None:
    assert Column("name", ["小さい"], is_text=True).width == 6


def test_markdown_has_every_column() -> None:
    sheet = Sheet([*SHEET.columns, Column("note", ["a|b", ""], is_text=True)])
    assert sheet.markdown().splitlines() == [
        "| name  | dense MACs | top-1 % | images/s | note |",
        "| :---- | ---------: | ------: | -------: | :--- |",
        r"| tiny  |       1.5G |   70.00 |      100 | a\|b |",
        "| whole |        20G |   80.00 |       10 |      |",
    ]


def test_no_rows() -> None:
    lines, _ = lines_of(Sheet([Column("name", []), Column("top-1 %", [])]), 80)
    assert lines[0] == "name  top-1 %"
