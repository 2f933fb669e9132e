"""Comparisons, checked against changes that were worked out by hand."""

from dataclasses import replace

from nestify.report.compare import compare, comparison_notes, comparison_tables
from tests.report.report_builders import layer, report

OLD = report(
    {"top1": 50.0, "prefix_bytes": 1_000_000, "layers": [layer("conv", 10), layer("fc", 20)]},
    {"top1": 70.0, "layers": [layer("conv", 100), layer("fc", 100)]},
    path="old",
)
NEW = report(
    {"top1": 52.5, "prefix_bytes": 900_000, "layers": [layer("conv", 30), layer("fc", 20)]},
    {"top1": 70.0, "layers": [layer("conv", 100), layer("fc", 100)]},
    path="new",
)


def test_changes_of_levels() -> None:
    comparison = compare(NEW, OLD)
    [table] = comparison_tables(comparison)
    columns = {column.title: list(column.cells) for column in table.columns}
    assert columns["top-1 %"] == ["52.50", "70.00"]
    assert columns["top-1 change"] == ["+2.50", "="]
    assert columns["prefix MiB change"] == ["-10.00 %", "="]
    assert "sparsity" not in columns  # left out: all are equal
    document = comparison.to_dict()
    assert document["levels"][0]["top1"] == {"here": 52.5, "there": 50.0, "change": 2.5}


def test_changes_of_layers() -> None:
    comparison = compare(NEW, OLD)
    assert [each.name for each in comparison.layers] == ["conv"]
    _, layers = comparison_tables(comparison, layers=True)
    assert [list(column.cells) for column in layers.columns] == [
        ["conv"],
        ["0.3000"],
        ["+0.2000"],
        ["1.0000"],
        ["="],
    ]
    assert "1 of 2 weights differ" in comparison_notes(comparison)[-1]


def test_a_file_compared_with_itself_has_no_changes() -> None:
    comparison = compare(NEW, NEW)
    assert not comparison.layers
    [table] = comparison_tables(comparison, layers=True)
    changes = [cell for column in table.columns if "change" in column.title for cell in column.cells]
    assert set(changes) == {"="}


def test_levels_that_only_one_file_has() -> None:
    more = report({}, {"name": "extra", "images": 5}, path="more")
    comparison = compare(more, OLD)
    assert [pair.name for pair in comparison.levels] == ["level1", "extra", "level2"]
    notes = comparison_notes(comparison)
    assert "Only more has level extra." in notes
    assert "Only old has level level2." in notes
    row = [column.cells[2] for column in comparison_tables(comparison)[0].columns]
    assert set(row[1:]) == {"-"}


def test_what_is_not_comparable_is_noted() -> None:
    other = report({"class_set": "kind", "classes": 3}, {"images": 50, "layers": []}, path="other")
    notes = comparison_notes(compare(other, OLD), layers=True)
    assert any("predicts different classes" in note for note in notes)
    assert "level2: validated on 100 images there and on 50 here." in notes
    assert any(note.startswith("Layers are not compared") for note in notes)


def test_options_that_differ() -> None:
    old, new = (
        replace(side, recipe={"output": side.path, "train": {"lr": lr, "opt": "sgd"}, "level": levels})
        for side, lr, levels in (
            (OLD, 0.1, [{"sparsity": 0.9}, {"sparsity": 0.0}]),
            (NEW, 0.3, [{"sparsity": 0.9}, {"sparsity": 0.0, "name": "a\x1b[31m"}]),
        )
    )
    comparison = compare(new, old)
    assert comparison.options == [("train.lr", "0.3", "0.1"), ("level[2].name", "a\x1b[31m", None)]
    _, table = comparison_tables(comparison)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [("train.lr", "0.1", "0.3"), ("level[2].name", "-", "a\\x1b[31m")]
    assert not compare(NEW, old).options  # the old report has no recipe
