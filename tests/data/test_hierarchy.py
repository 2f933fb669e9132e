"""Class hierarchies: the table, and targets in coarser classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestify.data.hierarchy import ClassLevels, coarse_target, read_class_levels
from nestify.errors import DataError, RecipeError

NAMES = ("ash", "cat", "dog", "oak")
TABLE = """species,kingdom,size
dog,animal,small
oak,plant,large
cat,animal,small
ash,plant,large
unused,mineral,tiny
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(TABLE)
    return path


def test_columns_become_classes_in_the_order_of_their_names(table: Path) -> None:
    labels = read_class_levels(str(table), NAMES, ["size", "kingdom", None], "photos")
    assert [(classes.name, classes.class_names) for classes in labels.hierarchy] == [
        ("kingdom", ["animal", "plant"]),
        ("size", ["large", "small"]),
    ]
    assert {level: parents.tolist() for level, parents in labels.parents.items()} == {
        1: [0, 1, 1, 0],
        2: [1, 0, 0, 1],
    }
    assert labels.counts(4) == [2, 2, 4]
    assert labels.class_sets(3) == ["size", "kingdom", ""]


@pytest.mark.parametrize(
    ("levels", "told"),
    [
        (1, [""]),
        (2, ["size", ""]),
        (3, ["size", "kingdom", ""]),
        (5, ["size", "kingdom", "", "", ""]),
    ],
)
def test_without_a_wish_the_core_level_tells_the_coarsest(table: Path, levels: int, told: list[str]) -> None:
    assert read_class_levels(str(table), NAMES, [None] * levels, "photos").class_sets(levels) == told


def test_without_a_hierarchy_all_levels_tell_the_same() -> None:
    labels = read_class_levels(None, None, [None, None], "photos")
    assert labels == ClassLevels()
    assert labels.parents == {}
    assert labels.counts(4) is None
    assert labels.class_sets(2) == ["", ""]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no column of coarser classes"),
        ("species\ndog\n", "no column of coarser classes"),
        ("species,kingdom,kingdom\n", "'species', 'kingdom', 'kingdom' have equal or empty names"),
        ("species,\n", "equal or empty names"),
        (TABLE.replace("oak,plant,large", "oak,plant"), "row 3 does not have one value for each"),
        (TABLE.replace("oak,plant", "oak,"), "row 3 does not have one value for each"),
        (TABLE + "dog,plant,small\n", "row 7 gives a different class for 'dog'"),
        (TABLE.replace("oak", "oaks"), "lacks the class 'oak'; did you mean it by 'oaks'"),
        ("species,kingdom\ndog,animal\n", "lacks the class 'ash' and 2 others; add a row"),
        ('species,kingdom\n"dog,animal\n', "not a CSV table"),
        ("species,kingdom\ndog,\udcff\n", "not a CSV table in UTF-8"),
    ],
)
def test_refused_tables(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=problem) as caught:
        read_class_levels(str(path), NAMES, [None, None], "photos")
    assert str(caught.value).startswith(f"{path}: ")


def test_rows_may_repeat_and_stand_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xef\xbb\xbf" + (TABLE + "\ndog, animal ,small\n").encode())
    assert read_class_levels(str(path), NAMES, ["kingdom", None], "photos").parents[1].tolist() == [
        1,
        0,
        0,
        1,
    ]


def test_what_a_level_cannot_tell(table: Path) -> None:
    with pytest.raises(RecipeError, match=r"level\[1\]\.classes = 'kingdon' .* did you mean 'kingdom'"):
        read_class_levels(str(table), NAMES, ["kingdon", None], "photos")
    with pytest.raises(RecipeError, match="it has 'kingdom', 'size'"):
        read_class_levels(str(table), NAMES, ["xyz", None], "photos")
    with pytest.raises(DataError, match="needs class names, which photos does not have"):
        read_class_levels(str(table), None, [None, None], "photos")
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        read_class_levels(str(table) + "x", NAMES, [None, None], "photos")


@given(st.data())
def test_soft_targets_add_up_within_a_coarse_class(data: st.DataObject) -> None:
    coarse = data.draw(st.integers(1, 5))
    parents = [*range(coarse), *data.draw(st.lists(st.integers(0, coarse - 1), max_size=6))]
    batch = data.draw(st.integers(0, 4))
    soft = np.random.default_rng(batch).dirichlet(np.ones(len(parents)), size=batch).astype(np.float32)
    member = np.eye(coarse, dtype=np.float32)[parents]  # (classes, coarse)
    given = torch.from_numpy(soft.reshape(batch, len(parents)))
    found = coarse_target(given, torch.tensor(parents))
    np.testing.assert_allclose(found.numpy(), given.numpy() @ member, rtol=1e-5)
    hard = torch.arange(len(parents))
    assert coarse_target(hard, torch.tensor(parents)).tolist() == parents
    assert coarse_target(hard, None) is hard
