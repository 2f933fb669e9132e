"""Accuracy by class next to a nested file: how it is saved, and refused if it is damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nestify.errors import BadFileError
from nestify.file.class_accuracy import (
    MAX_BYTES,
    LevelClasses,
    check_evaluation_savable,
    read_class_accuracy,
    save_class_accuracy,
)
from nestify.file.reader import NestedFile, open_nested_file
from nestify.file.writer import write_nested_file
from tests.file.builders import description, small_state

LEVELS = [
    LevelClasses(level=k, name=f"size-{k}", images=[4, 2], correct=[correct, 1])
    for k, correct in ((1, 0), (3, 4))
]
"""Two of the three levels of a file with two classes."""


@pytest.fixture
def file(tmp_path: Path) -> NestedFile:
    path = tmp_path / "small.nested.safetensors"
    write_nested_file(path, small_state(), description(3))
    return open_nested_file(path)


def test_it_is_saved_and_read(file: NestedFile) -> None:
    before = file.path.read_bytes()
    assert read_class_accuracy(file).accuracy is None
    place = save_class_accuracy(file, "some/\x1b[31m images\n", LEVELS)
    assert place == file.path.with_name("small.eval.json")
    found = read_class_accuracy(file)
    assert found.problem == ""
    assert found.accuracy is not None
    assert found.accuracy.levels == LEVELS
    assert found.accuracy.data.isprintable()
    assert file.path.read_bytes() == before
    save_class_accuracy(file, "others", LEVELS[:1])
    replaced = read_class_accuracy(file).accuracy
    assert replaced is not None
    assert (replaced.data, replaced.levels) == ("others", LEVELS[:1])


def test_it_belongs_to_one_file(file: NestedFile) -> None:
    save_class_accuracy(file, "images", LEVELS)
    write_nested_file(file.path, small_state(), description(3, seed=4))
    found = read_class_accuracy(open_nested_file(file.path))
    assert found.accuracy is None
    assert "small.eval.json: holds accuracies of another file" in found.problem
    assert "nestify eval" in found.problem
    save_class_accuracy(open_nested_file(file.path), "images", LEVELS)
    assert read_class_accuracy(open_nested_file(file.path)).problem == ""


def first(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    """Return a change of the first level of a document."""
    return lambda document: {**document, "levels": [{**document["levels"][0], **changes}]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda document: [], "valid dictionary"),
        (lambda document: {**document, "schema_version": 2}, "schema_version"),
        (lambda document: {**document, "more": 1}, "more"),
        (lambda document: {**document, "data": "x" * 201}, "data"),
        (lambda document: {**document, "levels": []}, "levels"),
        (lambda document: {**document, "levels": document["levels"][::-1]}, "ascending"),
        (first(level=4), "no level 4"),
        (first(name="other"), "no level 1 named 'other'"),
        (first(images=[4, 2, 1], correct=[0, 1, 1]), "2 classes"),
        (first(correct=[0]), "2 classes"),
        (first(correct=[5, 1]), "more correct predictions than images"),
        (first(correct=[-1, 1]), "correct"),
        (first(images=[4.5, 2]), "images"),
        (first(images=[2**50, 2]), "images"),
    ],
)
def test_a_damaged_document_is_refused(
    change: Callable[[dict[str, Any]], Any], reason: str, file: NestedFile
) -> None:
    place = save_class_accuracy(file, "images", LEVELS)
    place.write_text(json.dumps(change(json.loads(place.read_text()))))
    found = read_class_accuracy(file)
    assert found.accuracy is None
    assert found.problem.startswith(f"{place}: holds no accuracies that can be read")
    assert reason in found.problem
    assert "remove it" in found.problem
    with pytest.raises(BadFileError, match="remove it"):
        check_evaluation_savable(file)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"a": NaN}', b" " * (MAX_BYTES + 1)])
def test_what_is_not_a_document_is_refused(content: bytes, file: NestedFile) -> None:
    file.path.with_name("small.eval.json").write_bytes(content)
    assert "remove it" in read_class_accuracy(file).problem


def test_a_folder_of_that_name(file: NestedFile) -> None:
    file.path.with_name("small.eval.json").mkdir()
    assert "small.eval.json" in read_class_accuracy(file).problem
